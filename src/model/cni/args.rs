//! `CNI_ARGS` (`spec/plugin.md` 3).

/// What Kubernetes tells about the pod in `CNI_ARGS`; empty where it tells nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Args {
    /// `K8S_POD_NAME`.
    pub pod_name: String,
    /// `K8S_POD_NAMESPACE`.
    pub pod_namespace: String,
    /// `K8S_POD_INFRA_CONTAINER_ID`.
    pub infra_container_id: String,
    /// `K8S_POD_UID`.
    pub pod_uid: String,
}

impl Args {
    /// Reads `K=V;K2=V2`. Keys are case-sensitive, each pair has exactly one `=`, and keys that we do not know are an error
    /// unless `IgnoreUnknown` is true. The texts are those that log scrapers know.
    pub fn parse(text: &str) -> Result<Args, String> {
        let mut args = Args::default();
        if text.is_empty() {
            return Ok(args);
        }
        let mut ignore_unknown = false;
        let mut unknown = Vec::new();
        for pair in text.split(';') {
            let (key, value) = pair
                .split_once('=')
                .filter(|(_, value)| !value.contains('='))
                .ok_or_else(|| format!("ARGS: invalid pair {pair:?}"))?;
            match key {
                "IgnoreUnknown" => {
                    ignore_unknown = parse_bool(value)
                        .ok_or_else(|| format!("ARGS: error parsing value of pair {pair:?}: boolean expected"))?;
                }
                "K8S_POD_NAME" => value.clone_into(&mut args.pod_name),
                "K8S_POD_NAMESPACE" => value.clone_into(&mut args.pod_namespace),
                "K8S_POD_INFRA_CONTAINER_ID" => value.clone_into(&mut args.infra_container_id),
                "K8S_POD_UID" => value.clone_into(&mut args.pod_uid),
                _ => unknown.push(pair),
            }
        }
        if unknown.is_empty() || ignore_unknown { Ok(args) } else { Err(format!("ARGS: unknown args {unknown:?}")) }
    }
}

/// `1/true/0/false` in any case.
fn parse_bool(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "true" => Some(true),
        "0" | "false" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_kubernetes_sends_is_read() {
        let text = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=6f2c;\
                    K8S_POD_UID=7c0e;SOMETHING_NEW=x";
        let args = Args::parse(text).unwrap();
        assert_eq!(
            args,
            Args {
                pod_name: "web-0".into(),
                pod_namespace: "default".into(),
                infra_container_id: "6f2c".into(),
                pod_uid: "7c0e".into(),
            }
        );
    }

    #[test]
    fn malformed_and_unknown_pairs_are_told() {
        let check = |text, wanted: Result<(), &str>| {
            assert_eq!(Args::parse(text).map(drop), wanted.map_err(str::to_owned), "{text}");
        };
        check("", Ok(()));
        check("K8S_POD_NAME=", Ok(()));
        check("FOO=1;IgnoreUnknown=TRUE", Ok(()));
        check("K8S_POD_NAME", Err("ARGS: invalid pair \"K8S_POD_NAME\""));
        check("K8S_POD_NAME=a=b", Err("ARGS: invalid pair \"K8S_POD_NAME=a=b\""));
        check("K8S_POD_NAME=a;", Err("ARGS: invalid pair \"\""));
        check("FOO=1;IgnoreUnknown=0", Err("ARGS: unknown args [\"FOO=1\"]"));
        check("k8s_pod_name=a", Err("ARGS: unknown args [\"k8s_pod_name=a\"]"));
        check("IgnoreUnknown=yes", Err("ARGS: error parsing value of pair \"IgnoreUnknown=yes\": boolean expected"));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC*") {
            let _ = Args::parse(&text);
        }
    }
}
