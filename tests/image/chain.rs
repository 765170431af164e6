//! What a runtime does with the list of plugins that lies on the node's host: each in turn, with the result of the one before
//! (the CNI specification, section 4), from the folder where they were installed.

use crate::engine::Engine;
use enibox::sandbox::probe::PORT;
use enibox::sandbox::topology::Pod;
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::net::Ipv4Addr;
use std::process::Stdio;

/// Leads to [`PORT`] in the pod.
pub const HOST_PORT: u16 = 18080;

/// The list as it is installed.
pub struct Chain<'a> {
    engine: &'a Engine,
    list: Value,
}

/// The address in a result.
pub fn address(result: &Value) -> Ipv4Addr {
    let text = result["ips"][0]["address"].as_str().unwrap_or_else(|| panic!("no address: {result}"));
    text.split('/').next().unwrap().parse().unwrap()
}

impl<'a> Chain<'a> {
    /// Of this node.
    pub fn of(engine: &'a Engine) -> Chain<'a> {
        let list = fs::read(engine.on_host("etc/cni/net.d/10-aws.conflist")).unwrap();
        Chain { engine, list: serde_json::from_slice(&list).unwrap() }
    }

    /// Adds a pod; the last result.
    pub fn add(&self, pod: &Pod, name: &str) -> Value {
        let mut result = None;
        for plugin in self.plugins() {
            let output = self.call("ADD", plugin, pod, name, result.as_ref());
            result = Some(serde_json::from_str(&output).unwrap_or_else(|error| panic!("{plugin}: {error}: {output}")));
        }
        result.expect("a list is not empty")
    }

    /// Deletes it, twice, as a runtime may.
    pub fn delete(&self, pod: &Pod, name: &str, result: &Value) {
        for plugin in self.plugins().iter().rev().chain(self.plugins().iter().rev()) {
            self.call("DEL", plugin, pod, name, Some(result));
        }
    }

    fn plugins(&self) -> &[Value] {
        self.list["plugins"].as_array().expect("a list has plugins")
    }

    fn call(&self, verb: &str, plugin: &Value, pod: &Pod, name: &str, previous: Option<&Value>) -> String {
        let mut config = plugin.clone();
        config["name"] = self.list["name"].clone();
        config["cniVersion"] = self.list["cniVersion"].clone();
        if let Some(previous) = previous {
            config["prevResult"] = previous.clone();
        }
        if plugin["capabilities"]["portMappings"] == true {
            let mapping = json!({"hostPort": HOST_PORT, "containerPort": PORT, "protocol": "tcp"});
            config["runtimeConfig"] = json!({"portMappings": [mapping]});
        }
        let bin = self.engine.on_host("opt/cni/bin");
        let program = bin.join(plugin["type"].as_str().expect("a plugin has a type"));
        let mut command = self.engine.node.command(&program).unwrap();
        command.env_clear().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        command.envs([
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", &format!("container-of-{name}")),
            ("CNI_NETNS", &pod.path.display().to_string()),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", &bin.display().to_string()),
            (
                "CNI_ARGS",
                &format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={name};K8S_POD_UID={name}-uid"),
            ),
            ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        ]);
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        child.stdin.take().expect("piped").write_all(config.to_string().as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{verb} by {}: {}: {said}", program.display(), output.status);
        said
    }
}
