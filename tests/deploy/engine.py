"""A container engine for tests: podman and buildah, with a store of their own that is kept from run to run.

    base        Debian's smallest system with Python, made by mmdebstrap: nothing is fetched from an image registry
    images      built from docker/Dockerfile and, as stand-ins of PostgreSQL and Prometheus, from tests/deploy/images
    compose     podman-compose with the real docker/compose.yaml

The store is in ONEBIT_DEPLOY_STORE, by default /var/tmp/onebit-deploy; remove it to begin anew. A machine that cannot
set limits (no CAP_SYS_RESOURCE, no cgroups of version 2) gets runc behind runtime.py, which leaves them out.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
VERSION = "0.1.0"
BASE = "localhost/onebit-base:bookworm"
BUILD_SECONDS = 3600
CAP_SYS_RESOURCE = 24
LOCAL_SETTINGS = ("index-url", "extra-index-url", "find-links", "cert")
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


class Engine:
    """Runs podman, buildah and podman-compose against one store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "containers.conf").write_text(_containers_conf())
        (folder / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/store"\nrunroot = "{folder}/run"\n'
        )
        self.environment = {
            **os.environ,
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        }

    def run(self, *words: str, seconds: float = 300, check: bool = True, **variables: str) -> str:
        """Run a program and return what it wrote; with `check`, fail with all of it if it failed."""
        done = subprocess.run(
            words,
            env={**self.environment, **variables},
            cwd=ROOT,
            text=True,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
        assert not check or done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
        return done.stdout

    def podman(self, *words: str, seconds: float = 300, check: bool = True) -> str:
        """Run podman."""
        return self.run("podman", *words, seconds=seconds, check=check)

    def succeeds(self, *words: str) -> bool:
        """Whether podman ends with 0."""
        done = subprocess.run(["podman", *words], env=self.environment, capture_output=True, timeout=60, check=False)
        return done.returncode == 0

    def logs(self, container: str) -> str:
        """What a container wrote, both streams."""
        done = subprocess.run(
            ["podman", "logs", container], env=self.environment, capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    def wait_until(self, what: str, is_so: Callable[[], bool], seconds: float, container: str) -> None:
        """Ask every second; fail with the container's log when it takes too long or the container has ended."""
        deadline = time.monotonic() + seconds
        while not is_so():
            state = self.podman("inspect", container, "--format", "{{.State.Status}}", check=False).strip()
            if time.monotonic() > deadline or state == "exited":
                log = self.logs(container)[-6000:]
                raise AssertionError(f"{container} is {state}, and not {what} in {seconds} seconds:\n{log}")
            time.sleep(1)

    def make_base(self) -> None:
        """Make the base image, unless the store has it."""
        if self.succeeds("image", "exists", BASE):
            return
        with tempfile.TemporaryDirectory() as folder:
            archive = f"{folder}/base.tar"
            packages = "--include=python3,python3-venv,ca-certificates"
            self.run("mmdebstrap", "--variant=minbase", packages, "bookworm", archive, seconds=1200)
            self.podman("import", archive, BASE)

    def build(self, file: str, tag: str, *words: str) -> str:
        """Build an image, taking unchanged layers from the store, and return its name."""
        with tempfile.TemporaryDirectory() as folder:
            settings, mounts = _pip_settings()
            secret = Path(folder) / "pip.conf"
            secret.write_text(settings)
            network = ["--isolation", "chroot", "--network", "host"]
            volumes = [word for path in mounts for word in ("--volume", f"{path}:{path}:ro")]
            kept = ["--layers", "--format", "docker", "--ignorefile", _ignore_file(file)]
            arguments = ["--build-arg", f"BASE={BASE}", "--secret", f"id=pip_conf,src={secret}", *words]
            command = ["buildah", "bud", *network, *kept, *volumes, *arguments, "--file", file, "--tag", tag, "."]
            self.run(*command, seconds=BUILD_SECONDS)
        return tag


class Compose:
    """One run of docker/compose.yaml, in a project of its own."""

    def __init__(self, engine: Engine, project: str, profiles: tuple[str, ...], **variables: str) -> None:
        self.engine = engine
        self.project = project
        self._profiles = [word for profile in profiles for word in ("--profile", profile)]
        self._variables = variables

    def with_variables(self, **variables: str) -> "Compose":
        """The same project with further variables for what is started from now on."""
        other = Compose(self.engine, self.project, (), **self._variables, **variables)
        other._profiles = self._profiles
        return other

    def run(self, *words: str, seconds: float = 600) -> str:
        """Run one podman-compose command."""
        program = str(Path(sys.executable).parent / "podman-compose")
        command = [program, "-p", self.project, "-f", "docker/compose.yaml", *self._profiles, *words]
        return self.engine.run(*command, seconds=seconds, **self._variables)

    def container(self, service: str) -> str:
        """The name of a service's container."""
        return f"{self.project}_{service}_1"

    def finish(self, service: str, seconds: float = 300) -> None:
        """Start a service that runs once, and wait for its good end; older podmans do not wait by themselves."""
        self.run("up", "--detach", "--no-build", service)
        code = self.engine.podman("wait", self.container(service), seconds=seconds).strip()
        assert code == "0", self.engine.logs(self.container(service))

    def start(self, service: str, seconds: float = 300) -> None:
        """Start a service, and wait until its own health check says that it is well."""
        self.run("up", "--detach", "--no-build", "--no-deps", service)
        name = self.container(service)
        self.engine.wait_until("healthy", lambda: self.engine.succeeds("healthcheck", "run", name), seconds, name)

    def down(self) -> None:
        """Stop and remove everything, volumes too; of an interrupted run, podman-compose leaves some."""
        self.run("down", "--volumes")
        own = self.engine.podman("volume", "ls", "--quiet", "--filter", f"name=^{self.project}_").split()
        if own:
            self.engine.podman("volume", "rm", *own)


def _containers_conf() -> str:
    """Podman's settings; without the rights to set limits, with our runtime in place of crun."""
    general = '[containers]\nlog_driver = "k8s-file"\n[network]\nnetwork_backend = "netavark"\n'
    if _can_set_limits():
        return general
    runtime = HERE / "runtime.py"
    return (
        general.replace("[network]", 'cgroups = "enabled"\ndefault_ulimits = ["nofile=4096:4096"]\n[network]')
        + '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\nruntime = "crun"\n'
        + f'[engine.runtimes]\ncrun = ["{runtime}"]\n'
    )


def _can_set_limits() -> bool:
    status = Path("/proc/self/status").read_text()
    (effective,) = [line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")]
    return bool(int(effective, 16) >> CAP_SYS_RESOURCE & 1) and Path("/sys/fs/cgroup/cgroup.controllers").exists()


def _pip_settings() -> tuple[str, list[str]]:
    """A pip.conf of where this machine's pip looks, and the local files and folders that it names."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    found: dict[str, str] = {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        if name.rpartition(".")[2] in LOCAL_SETTINGS:
            found[name.rpartition(".")[2]] = value.strip("'")
    words = [word.removeprefix("file://") for value in found.values() for word in value.split()]
    folders = {str(Path(word).parent if word.endswith("/simple") else word) for word in words if word.startswith("/")}
    mounts = {path for path in folders | {CERTIFICATES} if Path(path).exists()}
    return "[global]\n" + "".join(f"{name} = {value}\n" for name, value in found.items()), sorted(mounts)


def _ignore_file(file: str) -> str:
    own = Path(f"{ROOT / file}.dockerignore")
    return str(own if own.exists() else HERE / "images" / "dockerignore")
