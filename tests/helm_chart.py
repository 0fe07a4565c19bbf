"""The chart `containers/helm/skin-lesion`, rendered by Helm."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT

MODULE = "helm.sh/helm/v3/cmd/helm@v3.22.0"
KUBERNETES = "1.37.0"
CHART = ROOT / "containers/helm/skin-lesion"
RELEASE = "demo"
VALUES = {"default": [], **{path.stem: ["--values", str(path)] for path in sorted((CHART / "ci").glob("*.yaml"))}}


@cache
def helm_program() -> str:
    """Return the path of Helm, which Go builds once (two minutes) unless it is installed."""
    if installed := shutil.which("helm"):
        return installed
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skin-lesion" / "bin"
    program = folder / f"helm-{MODULE.rpartition('@v')[2]}"
    if not program.exists():
        assert shutil.which("go"), "Neither Helm nor Go is on the PATH. Install one of them."
        new = folder / ".helm"
        environment = os.environ | {"GOBIN": str(new), "GOFLAGS": "-trimpath", "CGO_ENABLED": "0"}
        subprocess.run(["go", "install", "-ldflags=-s -w", MODULE], env=environment, check=True)
        (new / "helm").replace(program)
        new.rmdir()
    return str(program)


def helm(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([helm_program(), *words], capture_output=True, text=True, timeout=60)


def render(*options: str) -> list[dict[str, Any]]:
    """Return the manifests of a release."""
    done = helm("template", RELEASE, str(CHART), f"--kube-version={KUBERNETES}", *options)
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def pods(manifests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the pod specifications by component."""
    templates = (manifest["spec"]["template"] for manifest in manifests if "template" in manifest.get("spec", {}))
    return {template["metadata"]["labels"]["app.kubernetes.io/component"]: template["spec"] for template in templates}


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def environment(container: dict[str, Any]) -> dict[str, str | None]:
    """Return the variables of a container; None for references."""
    return {variable["name"]: variable.get("value") for variable in container.get("env", [])}


def arrows(manifests: list[dict[str, Any]], direction: str) -> set[tuple[str, str, object]]:
    """Return (from, to, port) between components that the NetworkPolicies of one direction allow."""
    peers = {"ingress": "from", "egress": "to"}[direction]
    allowed = set()
    for policy in (manifest for manifest in manifests if manifest["kind"] == "NetworkPolicy"):
        own = component(policy["spec"])
        for rule in policy["spec"][direction] or []:
            for peer in rule[peers]:
                if "podSelector" in peer:
                    for port in rule.get("ports", [{"port": "any"}]):
                        pair = (component(peer), own) if direction == "ingress" else (own, component(peer))
                        allowed.add((*pair, port["port"]))
    return allowed


def component(values: dict[str, Any]) -> str:
    return values["podSelector"]["matchLabels"]["app.kubernetes.io/component"]


def composed() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the services of docker-compose.yml, with the defaults of the variables."""
    text = (ROOT / "docker-compose.yml").read_text()
    while text != (text := re.sub(r"\$\{\w+:-((?:[^${}]|\$(?!\{))*)\}", r"\1", text)):
        pass
    yield from yaml.safe_load(text)["services"].items()
