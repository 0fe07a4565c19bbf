"""Pods of rendered manifests, run by a Docker Engine: containers that share a network address, volumes and security.

A volume belongs to root and the pod's group, as Kubernetes makes it. NetworkPolicies are not enforced.
"""

import re
import subprocess
from dataclasses import dataclass, field
from typing import Any

from tests.helm_chart import containers
from tests.waiting import eventually

PROJECT = "skin-lesion-helm-test"
_COMPONENT = "app.kubernetes.io/component"
PAUSE = "skin-lesion/proxy:helm-test"  # any image with sleep and Python


def docker(*words: str, check: bool = True, timeout: float = 300) -> str:
    done = subprocess.run(["docker", *words], capture_output=True, text=True, timeout=timeout)
    assert not check or done.returncode == 0, f"docker {' '.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


def clean() -> None:
    """Remove what an earlier run left."""
    label = f"label={PROJECT}"
    for kind, listed in (("rm", ["ps", "--all"]), ("volume rm", ["volume", "ls"]), ("network rm", ["network", "ls"])):
        if names := docker(*listed, "--quiet", "--filter", label).split():
            docker(*kind.split(), *(["--force"] if kind != "network rm" else []), *names)


@dataclass
class Pod:
    """One pod of a manifest."""

    name: str
    spec: dict[str, Any]
    services: list[str]
    secrets: dict[str, dict[str, str]]
    publish: dict[int, int] = field(default_factory=dict)

    def start(self) -> "Pod":
        """Start the pod, after its init containers have ended well."""
        aliases = [f"--network-alias={service}" for service in self.services]
        ports = [f"--publish=127.0.0.1:{port}:{own}" for own, port in self.publish.items()]
        options = [f"--label={PROJECT}", f"--network={PROJECT}", *aliases, *ports, "--entrypoint=sleep"]
        docker("run", "--detach", f"--name={self._full()}", *options, PAUSE, "infinity")
        self._make_volumes()
        for container in self.spec.get("initContainers", []):
            eventually(lambda container=container: self._run(container) == 0, 180)
        for container in self.spec["containers"]:
            self._run(container, "--detach")
        return self

    def ready(self, seconds: float = 240) -> None:
        """Wait until every probe of the manifest succeeds."""
        for container in self.spec["containers"]:
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if probe in container:
                    eventually(
                        lambda container=container, probe=probe: self._probe(container, container[probe]),
                        seconds,
                        lambda container=container: self.log(container["name"]),
                    )

    def execute(self, container: str, *words: str, check: bool = True) -> str:
        return docker("exec", self._full(container), *words, check=check)

    def kill(self) -> None:
        """Kill all processes and take the pod from the network; its volumes stay."""
        docker("rm", "--force", *(self._full(c["name"]) for c in self.spec["containers"]), self._full())

    def log(self, container: str) -> str:
        done = subprocess.run(["docker", "logs", "--tail=40", self._full(container)], capture_output=True, text=True)
        return done.stdout + done.stderr

    def _full(self, part: str = "") -> str:
        return f"{PROJECT}-{self.name}-{part}".strip("-")

    def _make_volumes(self) -> None:
        names = {mount["name"] for container in containers(self.spec) for mount in container.get("volumeMounts", [])}
        group = self.spec["securityContext"]["fsGroup"]
        mounts = []
        for name in names:
            if self._full(name) not in docker("volume", "ls", "--quiet").split():
                docker("volume", "create", f"--label={PROJECT}", self._full(name))
            mounts.append(f"--mount=type=volume,source={self._full(name)},target=/v/{name},volume-nocopy")
        command = f"for v in /v/*; do chown 0:{group} $v; chmod 2777 $v; done"
        docker("run", "--rm", "--user=0", f"--label={PROJECT}", *mounts, "--entrypoint=sh", PAUSE, "-c", command)

    def _run(self, container: dict[str, Any], *options: str) -> int:
        """Run a container as the manifest says. Returns its exit code."""
        security, own = self.spec["securityContext"], container["securityContext"]
        assert own["readOnlyRootFilesystem"] and own["capabilities"] == {"drop": ["ALL"]}
        assert own["allowPrivilegeEscalation"] is False and security["seccompProfile"]["type"] == "RuntimeDefault"
        words = [
            f"--name={self._full(container['name'])}",
            f"--label={PROJECT}",
            f"--network=container:{self._full()}",
            f"--user={security['runAsUser']}:{security['runAsGroup']}",
            f"--group-add={security['fsGroup']}",
            "--read-only",
            "--cap-drop=ALL",
            "--security-opt=no-new-privileges",  # seccomp: the engine's default profile
            f"--memory={container['resources']['limits']['memory'].replace('i', '').lower()}",
        ]
        words += [f"--env={name}={value}" for name, value in self._environment(container).items()]
        for mount in container.get("volumeMounts", []):
            if mount["mountPath"] != "/dev/shm":  # the engine makes it
                readonly = ",readonly" if mount.get("readOnly") else ""
                source = f"type=volume,source={self._full(mount['name'])},target={mount['mountPath']}"
                words.append(f"--mount={source},volume-nocopy{readonly}")
        command = container.get("command", [])
        entrypoint = [f"--entrypoint={command[0]}"] if command else []
        arguments = [*command[1:], *container.get("args", [])]
        docker("rm", "--force", self._full(container["name"]), check=False)
        run = ["docker", "run", *options, *words, *entrypoint, container["image"], *arguments]
        return subprocess.run(run, capture_output=True, text=True, timeout=300).returncode

    def _environment(self, container: dict[str, Any]) -> dict[str, str]:
        values = {}
        for variable in container.get("env", []):
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                values[variable["name"]] = self.secrets[reference["name"]][reference["key"]]
            elif "valueFrom" in variable:
                fields = {"metadata.name": lambda: self.name, "status.podIP": self._address}
                values[variable["name"]] = fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]()
            else:  # Kubernetes puts the variables before it in place of $(NAME)
                known = dict(values)
                values[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda m, v=known: v[m[1]], variable["value"])
        return values

    def _address(self) -> str:
        template = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        return docker("inspect", "--format", template, self._full())

    def _probe(self, container: dict[str, Any], probe: dict[str, Any]) -> bool:
        if "exec" in probe:
            words = ["exec", self._full(container["name"]), *probe["exec"]["command"]]
        else:
            check = probe.get("httpGet") or probe["tcpSocket"]
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            code = f"import socket; socket.create_connection(('127.0.0.1', {ports[check['port']]}), 5)"
            if "path" in check:
                url = f"http://127.0.0.1:{ports[check['port']]}{check['path']}"
                code = f"import urllib.request; urllib.request.urlopen('{url}', timeout=5)"
            words = ["exec", self._full(), "python", "-c", code]
        return subprocess.run(["docker", *words], capture_output=True).returncode == 0


@dataclass
class Release:
    """The pods of a rendered chart."""

    manifests: list[dict[str, Any]]
    secrets: dict[str, dict[str, str]]

    def pod(self, part: str, name: str = "", publish: dict[int, int] | None = None) -> Pod:
        """Return a pod of a component, with the names of the Services that select it."""
        spec, services = None, []
        for manifest in self.manifests:
            if manifest["kind"] == "Service" and manifest["spec"]["selector"][_COMPONENT] == part:
                services.append(manifest["metadata"]["name"])
            elif "template" in manifest.get("spec", {}):
                template = manifest["spec"]["template"]
                if template["metadata"]["labels"][_COMPONENT] == part:
                    spec = template["spec"]
        assert spec, f"no pod of {part}"
        return Pod(name or part, spec, services, self.secrets, publish or {})


def process_status(pod: Pod, container: str) -> str:
    """Return /proc/1/status of a container."""
    return pod.execute(container, "cat", "/proc/1/status")


def network() -> None:
    docker("network", "create", f"--label={PROJECT}", PROJECT)
