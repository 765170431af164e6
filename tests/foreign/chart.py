"""Renders the chart with Helm's own engine and validates what comes out against Kubernetes' schemas.

Standard input: {"chart": folder, "cases": {name: values as YAML}, "queries": [PromQL], "files": [path of
YAML]}. Standard output: {"helm": version,
"lint": {case: [message]}, "cases": {case: {"error": text} or {"texts": {template: text}, "objects": [object]}},
"invalid": [text], "control": [text]}; what is in
"control" must be refused. The package helm-python-sdk holds Helm's Go code as a library, without its command line.
"""

import json
import sys

import helm_python
import jsonschema
import kubernetes_validate
import promql_parser
import yaml

# The oldest version that Chart.yaml allows and the newest that the package knows.
KUBERNETES = ["1.25", kubernetes_validate.latest_version()]
WARNING = 2  # helm's severity


def schema_of(crd):
    return crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def check(thing, crds):
    """What is wrong with an object, one line each."""
    kind = thing["kind"]
    if kind in crds:
        errors = jsonschema.Draft7Validator(schema_of(crds[kind])).iter_errors(thing)
        return [f"{error.json_path}: {error.message}" for error in errors]
    found = []
    for version in KUBERNETES:
        try:
            kubernetes_validate.validate(thing, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"Kubernetes {version}: {list(error.path)}: {error.message}")
        except kubernetes_validate.SchemaNotFoundError:
            # A type of the Prometheus operator; the table in the test says what it must be.
            if not thing["apiVersion"].startswith("monitoring.coreos.com/"):
                found.append(f"Kubernetes {version}: no such type")
    return found


def render(chart, values):
    try:
        texts = chart.render(helm_python.values_from_yaml(values), name="aws-vpc-cni", namespace="kube-system")
    except helm_python.HelmError as error:
        return {"error": str(error)}
    objects = []
    for name, text in texts.items():
        if not name.endswith(".txt"):
            objects += [thing for thing in yaml.safe_load_all(text) if thing]
    return {"texts": texts, "objects": objects}


def check_query(query):
    try:
        promql_parser.parse(query)
    except Exception as error:  # the package raises ValueError or its own, by version
        return [f"{query}: {error}"]
    return []


def control(objects, crds):
    """The checks themselves: one line each for things that are wrong."""
    daemonset = next(thing for thing in objects if thing["kind"] == "DaemonSet")
    misspelt = json.loads(json.dumps(daemonset))
    misspelt["spec"]["template"]["spec"]["hostNetwrk"] = True
    config = {"apiVersion": "crd.k8s.amazonaws.com/v1alpha1", "kind": "ENIConfig", "spec": {"subnet": 7}}
    found = [check(misspelt, crds), check(config, crds), check_query("sum(rate(x[5m])")]
    return [lines[0] for lines in found if lines]


def main():
    asked = json.load(sys.stdin)
    chart = helm_python.Chart.load(asked["chart"])
    own = [yaml.safe_load(crd["data"]) for crd in chart.crds]
    crds = {crd["spec"]["names"]["kind"]: crd for crd in own}
    told = {"helm": helm_python.helm_sdk_version(), "lint": {}, "cases": {}, "invalid": [], "crds": own}
    told["crd_texts"] = [crd["data"] for crd in chart.crds]
    for crd in own:
        told["invalid"] += [f"{crd['metadata']['name']}: {line}" for line in check(crd, {})]
    for name, values in asked["cases"].items():
        told["cases"][name] = rendered = render(chart, values)
        for thing in rendered.get("objects", []):
            what = f"{name}: {thing['kind']} {thing['metadata']['name']}"
            told["invalid"] += [f"{what}: {line}" for line in check(thing, crds)]
        report = helm_python.lint(asked["chart"], helm_python.values_from_yaml(values), namespace="kube-system")
        messages = [f"{m['path']}: {m['error']}" for m in report["messages"] if m["severity"] >= WARNING]
        told["lint"][name] = messages + [str(error) for error in report["errors"]]
    for path in asked["files"]:
        with open(path) as file:
            for thing in yaml.safe_load_all(file):
                told["invalid"] += [f"{path}: {thing['kind']}: {line}" for line in check(thing, crds)]
    for query in asked["queries"]:
        told["invalid"] += check_query(query)
    told["control"] = control(told["cases"]["default"]["objects"], crds)
    json.dump(told, sys.stdout)


main()
