"""What operators are given to start opscore with: every command, port, variable and path that it
names is there, and the services of docker-compose.yml run as written, but for the containers.

There need be no Docker: their commands run as plain processes, in the environment they name, on
servers of this machine, until their health checks pass.
"""

import fnmatch
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import httpx2
import kubernetes_validate
import psutil
import psycopg2
import pytest
import yaml
from redis import Redis
from redis.exceptions import AuthenticationError
from stack import ROOT, Servers, wait_until
from test_install import VERSION
from test_migrations import database
from test_web_process import free_port

from opscore.__main__ import main
from opscore.config import QUEUES, Settings
from opscore.local import WORKER_ENDS_SECONDS
from opscore.servers import find_postgres, find_redis, server_account

DECLARED = {f.metadata["variable"]: f for f in fields(Settings)}
GRACE_SECONDS = DECLARED["OPSCORE_GRACE_SECONDS"].default + WORKER_ENDS_SECONDS
GUNICORN_GRACE_SECONDS = 30
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name in SERVICES if name not in ("postgres", "redis")]
LASTING = [name for name in OURS if name != "migrate"]
SIZES = {"k": 2**10, "m": 2**20, "g": 2**30}

Command = tuple[tuple[str, ...], dict[str, Any]]


def parse(arguments: Sequence[str]) -> Command:
    """Return the names and options of an `opscore` command; fail if there is no such one."""
    names: list[str] = []
    context = click.Context(main, info_name="opscore")
    command: click.Command = main
    rest = list(arguments)
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, rest)
        assert name and found
        names.append(name)
        command = found
    made = command.make_context(names[-1], rest, parent=context)
    return tuple(names), made.params


# --- .env ---------------------------------------------------------------------------------------

EXAMPLE = (ROOT / ".env.example").read_text()
SHOWN = dict(re.findall(r"^(?:# )?([A-Z_]+)=(.*)$", EXAMPLE, re.MULTILINE))
"""What .env.example names, also as a comment, with the value it shows."""
REQUIRED = dict(re.findall(r"^([A-Z_]+)=(.*)$", EXAMPLE, re.MULTILINE))
GIVEN = {
    "POSTGRES_PASSWORD": "postgres0password0of0tests",
    "REDIS_PASSWORD": "redis0password0of0tests",
    "OPSCORE_API_KEY": "key0of0the0tests0of0compose",
    "FLOWER_BASIC_AUTH": "somebody:secret0of0flower",
}
VARIABLE = re.compile(r"\$\{([A-Z_]+)(?:(:-|:\?)([^}]*))?\}")


def filled(text: str, env: Mapping[str, str] = GIVEN) -> str:
    """Return a text of docker-compose.yml with its variables as Compose fills them in."""

    def value(found: re.Match[str]) -> str:
        name, kind, other = found.groups()
        assert env.get(name) or kind == ":-", (name, other)
        return env.get(name) or str(other)

    return VARIABLE.sub(value, text)


def used(node: Any) -> set[tuple[str, str, str]]:
    return set(VARIABLE.findall(json.dumps(node)))


def test_the_example_of_env_names_every_variable_of_compose_with_its_default_and_no_other() -> None:
    variables = used(COMPOSE)
    assert {name for name, _, _ in variables} == set(SHOWN)
    assert {name for name, kind, _ in variables if kind == ":?"} == set(REQUIRED) == set(GIVEN)
    assert set(REQUIRED.values()) == {""}
    for name, kind, default in variables:
        if kind == ":-" and default:
            assert SHOWN[name] == default, name


def test_the_example_of_env_names_every_setting_with_its_default() -> None:
    made = {"DATABASE_URL", "REDIS_URL", "OPSCORE_ALIVE_FILE"}  # what the others say
    assert set(DECLARED) - made == {n for n in SHOWN if n.startswith("OPSCORE_")}
    defaults = Settings.from_env({"DATABASE_URL": "postgresql://h/n", "OPSCORE_API_KEY": "k" * 16})
    unset = {"OPSCORE_API_KEY", "OPSCORE_DATABASE_POOL"}  # by the threads of each process
    for name in set(SHOWN) & set(DECLARED) - unset:
        shown = {**os.environ, "DATABASE_URL": "postgresql://h/n", "OPSCORE_API_KEY": "k" * 16}
        assert DECLARED[name].default is not MISSING
        attribute = DECLARED[name].name
        read = Settings.from_env({**shown, name: SHOWN[name]})
        assert getattr(read, attribute) == getattr(defaults, attribute), name


def test_secrets_stay_out_of_git_and_of_the_image() -> None:
    for name in (".env", "agents.env"):
        assert name in (ROOT / ".gitignore").read_text().splitlines()
        assert is_left_out(name) and is_left_out(f"web/{name}")
    assert not re.search(r"(KEY|PASSWORD|SECRET|AUTH)=\S", EXAMPLE)


def is_left_out(path: str) -> bool:
    """Tell whether .dockerignore keeps a path out of what an image is built from."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            parents = [path, *map(str, Path(path).parents)]
            tried = [Path(p).name for p in parents] if "**/" in line else parents
            if any(fnmatch.fnmatchcase(each, pattern) for each in tried if each != "."):
                out = not line.startswith("!")
    return out


# --- Dockerfile ---------------------------------------------------------------------------------

INSTRUCTIONS = [
    (line.split(None, 1)[0], line.split(None, 1)[1].strip() if " " in line else "")
    for line in re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text()).splitlines()
    if line and not line.startswith("#")
]
STAGES = [i for i, (word, _) in enumerate(INSTRUCTIONS) if word == "FROM"]
FINAL = INSTRUCTIONS[STAGES[-1] :]


def one(word: str, among: list[tuple[str, str]] = FINAL) -> str:
    (value,) = [value for each, value in among if each == word]
    return value


def test_the_image_is_slim_built_in_stages_and_runs_as_nobody_in_particular() -> None:
    assert len(STAGES) == 2
    assert all("-slim" in INSTRUCTIONS[i][1] for i in STAGES)
    uid, gid = one("USER").split(":")
    assert int(uid) > 0 and int(gid) > 0
    last = [word for word, _ in FINAL]
    assert "RUN" not in last[last.index("USER") :]
    assert not [value for word, value in FINAL if word == "RUN" and "pip" in value]


def test_what_the_image_is_made_of_is_there_and_not_left_out() -> None:
    sources = [
        source
        for word, value in INSTRUCTIONS
        if word == "COPY" and "--from" not in value
        for source in value.split()[:-1]
    ]
    for source in sources:
        assert (ROOT / source).exists() and not is_left_out(source), source
    built = "\n".join(f"{word} {value}" for word, value in INSTRUCTIONS[: STAGES[-1]])
    for path in re.findall(r"-r ([\w/.]+)", built):
        assert path in sources
        for below in re.findall(r"^-r (\S+)", (ROOT / path).read_text(), re.MULTILINE):
            assert os.path.normpath(Path(path).parent / below) in sources
    assert {"opscore", "web", "workers", "celeryconfig.py", "LICENSE", "NOTICE"} <= set(sources)
    (arguments,) = {tuple(SERVICES[name]["build"]["args"]) for name in OURS}
    assert {("ARG", f"{name}=") for name in arguments} <= set(INSTRUCTIONS)


def test_signals_reach_the_process_and_what_it_runs_is_a_command() -> None:
    entry, default = json.loads(one("ENTRYPOINT")), json.loads(one("CMD"))  # not by a shell
    assert entry == ["tini", "--", "opscore"]
    names, options = parse(default)
    assert (names, options["host"]) == (("web",), "0.0.0.0")
    assert str(options["port"]) in one("EXPOSE").split()
    assert one("STOPSIGNAL") == "SIGTERM"
    assert "PYTHONUNBUFFERED=1" in one("ENV")


# --- docker-compose.yml -------------------------------------------------------------------------


def command_of(name: str) -> list[str]:
    return [filled(word) for word in SERVICES[name]["command"]]


def seconds(text: str) -> float:
    return float(filled(text).removesuffix("s"))


def test_compose_has_every_service_with_what_each_needs() -> None:
    servers = {"postgres", "redis"}
    workers = {"worker-agents", "worker-io", "worker-control"}
    assert set(SERVICES) == servers | workers | {"migrate", "web", "beat", "flower"}
    for name, service in SERVICES.items():
        limits = service["deploy"]["resources"]["limits"]
        assert set(limits) == {"cpus", "memory", "pids"}
        assert service["restart"] == ("no" if name == "migrate" else "unless-stopped")
        assert ("healthcheck" in service) == (name != "migrate")
        assert "inside" in service["networks"]
        assert ("ports" in service) == (name in ("web", "flower"))
    assert COMPOSE["networks"]["inside"] == {"internal": True}
    assert {n for n, s in SERVICES.items() if "outside" in s["networks"]} == {
        *("web", "flower", "worker-agents", "worker-io")
    }
    mounted = {v.split(":")[0] for s in servers for v in SERVICES[s]["volumes"]}
    assert mounted == set(COMPOSE["volumes"]) - {"files"}


def test_our_containers_can_write_to_nothing_but_tmp_and_the_files_of_agents() -> None:
    made = "install --directory --owner=10001 --group=10001 /files"
    assert ("RUN", made) in FINAL and one("USER") == "10001:10001"
    for name in OURS:
        service = SERVICES[name]
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert [mount.split(":")[0] for mount in service["tmpfs"]] == ["/tmp"]
        for volume in service.get("volumes", []):
            if volume != "files:/files":
                source, target, mode = filled(volume).split(":")
                assert mode == "ro" and target == one("WORKDIR") and (ROOT / source).is_dir()


def test_everything_waits_for_the_tables() -> None:
    assert SERVICES["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    for name in LASTING:
        assert SERVICES[name]["depends_on"] == {
            "migrate": {"condition": "service_completed_successfully"}
        }


def test_compose_waits_longer_for_a_process_than_that_takes_to_end() -> None:
    for name in LASTING:
        _, options = parse(command_of(name))
        if "queues" in options:
            assert seconds(SERVICES[name]["stop_grace_period"]) > GRACE_SECONDS
    assert seconds(SERVICES["web"]["stop_grace_period"]) > GUNICORN_GRACE_SECONDS


def test_the_variables_of_each_container_are_settings() -> None:
    for name in OURS:
        for variable in SERVICES[name]["environment"]:
            known = variable in DECLARED or variable.startswith(("OTEL_", "FLOWER_"))
            assert known and (not variable.startswith("FLOWER_") or name == "flower"), variable
        assert set(DECLARED) <= set(SERVICES[name]["environment"])
    from flower.options import default_options

    for variable in SERVICES["flower"]["environment"]:
        if variable.startswith("FLOWER_"):
            assert variable.removeprefix("FLOWER_").lower() in default_options


def test_the_urls_lead_to_the_servers_that_compose_starts() -> None:
    environment = {k: filled(str(v)) for k, v in SERVICES["web"]["environment"].items()}
    url = urlsplit(environment["DATABASE_URL"])
    made = {k: filled(v) for k, v in SERVICES["postgres"]["environment"].items()}
    assert (url.username, url.password) == (made["POSTGRES_USER"], made["POSTGRES_PASSWORD"])
    assert (url.hostname, url.port, url.path[1:]) == ("postgres", 5432, made["POSTGRES_DB"])
    assert SERVICES["postgres"]["image"] == "postgres:18"
    assert SERVICES["postgres"]["volumes"] == ["postgres:/var/lib/postgresql"]
    url = urlsplit(environment["REDIS_URL"])
    assert (url.hostname, url.port, url.password) == ("redis", 6379, GIVEN["REDIS_PASSWORD"])


def test_ports_agree() -> None:
    web = parse(command_of("web"))[1]["port"]
    flower = int(SERVICES["flower"]["environment"]["FLOWER_PORT"])
    assert one("EXPOSE").split() == [str(web), str(flower)]
    for name, port in (("web", web), ("flower", flower)):
        (published,) = SERVICES[name]["ports"]
        assert filled(published) == f"127.0.0.1:{port}:{port}"
        assert urlsplit(SERVICES[name]["healthcheck"]["test"][-1]).port == port


def test_every_queue_has_a_worker() -> None:
    queues = [parse(command_of(name))[1]["queues"] for name in LASTING if "worker" in name]
    assert sorted(queues) == sorted(QUEUES)


def test_redis_has_room_to_rewrite_its_file() -> None:
    words = command_of("redis")
    room = words[words.index("--maxmemory") + 1].removesuffix("b")
    limit = SERVICES["redis"]["deploy"]["resources"]["limits"]["memory"]
    assert 2 * int(room[:-1]) * SIZES[room[-1]] <= int(limit[:-1]) * SIZES[limit[-1]]


# --- Running ------------------------------------------------------------------------------------


@dataclass
class Site:
    """The services of docker-compose.yml as processes of this machine."""

    folder: Path
    ports: dict[str, int]
    database_url: str
    processes: dict[str, "subprocess.Popen[bytes]"]

    def here(self, name: str, text: str) -> str:
        """Return a text of a service with this machine's hosts, ports and folders in it."""
        text = filled(text).replace("redis:6379", f"127.0.0.1:{self.ports['6379']}")
        for port in ("8000", "5555"):
            text = re.sub(rf"\b{port}\b", str(self.ports[port]), text)
        return text.replace("/tmp/", f"{self.folder / name / 'tmp'}/")

    def environment(self, name: str) -> dict[str, str]:
        given = SERVICES[name]["environment"].items()
        environment = {variable: self.here(name, str(value)) for variable, value in given}
        return {
            **environment,
            "DATABASE_URL": self.database_url,
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "HOME": str(self.folder / name / "home"),
            "TMPDIR": str(self.folder / name / "tmp"),
        }

    def start(self, name: str, arguments: Sequence[str]) -> "subprocess.Popen[bytes]":
        for folder in ("home", "tmp", "app"):
            (self.folder / name / folder).mkdir(parents=True)
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "opscore", *arguments],
                env=self.environment(name),
                cwd=self.folder / name / "app",
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.processes[name]

    def is_healthy(self, name: str) -> bool:
        """Run a service's health check as it is written."""
        kind, program, *arguments = SERVICES[name]["healthcheck"]["test"]
        assert (kind, program) == ("CMD", "opscore")
        done = subprocess.run(
            [sys.executable, "-m", "opscore", *(self.here(name, word) for word in arguments)],
            env=self.environment(name),
            cwd=self.folder / name / "app",
            capture_output=True,
        )
        return done.returncode == 0

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()


@pytest.fixture(scope="module")
def site(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    ports = {name: free_port() for name in ("8000", "5555", "6379")}
    with ExitStack() as cleanup:
        url = cleanup.enter_context(database(servers))
        site = Site(folder, ports, url, {})
        cleanup.callback(stop, site)
        (folder / "redis").mkdir()
        program, *options = command_of("redis")
        assert program == "valkey-server"
        here = ["--port", str(ports["6379"]), "--dir", str(folder / "redis"), "--bind", "127.0.0.1"]
        site.processes["redis"] = subprocess.Popen(
            [find_redis(), *options, *here], stdout=subprocess.DEVNULL
        )
        assert site.start("migrate", command_of("migrate")).wait(60) == 0, site.log("migrate")
        for name in LASTING:
            site.start(name, [site.here(name, word) for word in SERVICES[name]["command"]])
        yield site


def stop(site: Site) -> None:
    for process in site.processes.values():
        process.terminate()
    for name, process in site.processes.items():
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            if name != "redis":
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()


@pytest.mark.parametrize("name", LASTING)
def test_each_service_runs_as_written_until_its_health_check_passes(site: Site, name: str) -> None:
    process = site.processes[name]
    wait_until(lambda: process.poll() is not None or site.is_healthy(name), seconds=60)
    assert process.poll() is None, site.log(name)


def test_the_site_is_ready_and_flower_wants_a_password(site: Site) -> None:
    api = f"http://127.0.0.1:{site.ports['8000']}"
    wait_until(lambda: httpx2.get(f"{api}/ready").status_code, seconds=30, says=lambda s: s == 200)
    headers = {"Authorization": f"Bearer {GIVEN['OPSCORE_API_KEY']}"}
    found = wait_until(
        lambda: httpx2.get(f"{api}/v1/opscore/status", headers=headers).json(),
        says=lambda said: len(said["workers"]) == 3,
    )
    assert found["problems"] == []
    flower = f"http://127.0.0.1:{site.ports['5555']}"
    name, password = GIVEN["FLOWER_BASIC_AUTH"].split(":")
    assert httpx2.get(f"{flower}/workers").status_code == 401
    assert httpx2.get(f"{flower}/workers", auth=(name, password)).status_code == 200
    refused = httpx2.post(f"{flower}/api/worker/shutdown/x", auth=(name, password))
    assert refused.status_code == 403  # FLOWER_READ_ONLY


def test_redis_keeps_what_it_has_forgets_nothing_and_wants_a_password(site: Site) -> None:
    port = site.ports["6379"]
    with Redis(port=port, password=GIVEN["REDIS_PASSWORD"]) as redis:
        kept = redis.config_get("appendonly", "appendfsync", "maxmemory-policy", "maxmemory")
    assert kept == {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "maxmemory": str(256 * 2**20),
    }
    with Redis(port=port) as stranger, pytest.raises(AuthenticationError):
        stranger.ping()
    # The image has valkey-cli, which we have not: at least its password is where it looks for it.
    check = SERVICES["redis"]["healthcheck"]["test"]
    assert check == ["CMD-SHELL", "valkey-cli ping | grep -q PONG"]
    assert filled(SERVICES["redis"]["environment"]["REDISCLI_AUTH"]) == GIVEN["REDIS_PASSWORD"]


def test_postgres_knows_its_options_and_its_health_check_passes(servers: Servers) -> None:
    program, *options = command_of("postgres")
    assert program == "postgres"
    connection = psycopg2.connect(servers.postgres.url)
    with connection.cursor() as cursor:
        for flag, option in zip(options[::2], options[1::2], strict=True):
            assert flag == "-c"
            name, value = option.split("=")
            cursor.execute("SELECT max_val::float FROM pg_settings WHERE name = %s", [name])
            assert int(value) <= cursor.fetchall()[0][0]
    connection.close()
    kind, program, *arguments = SERVICES["postgres"]["healthcheck"]["test"]
    assert kind == "CMD"
    url = urlsplit(servers.postgres.url)
    binary = find_postgres(server_account()).bin / program
    done = subprocess.run([binary, *arguments, f"--host={url.hostname}", f"--port={url.port}"])
    assert done.returncode == 0


def test_processes_write_nowhere_but_to_tmp_and_end_in_time(site: Site) -> None:
    """The last: it ends them."""
    children = {name: psutil.Process(site.processes[name].pid).children(True) for name in LASTING}
    for name in LASTING:
        site.processes[name].send_signal(signal.SIGTERM)
    for name in LASTING:
        assert site.processes[name].wait(GRACE_SECONDS) in (0, -signal.SIGTERM), site.log(name)
        assert not psutil.wait_procs(children[name], timeout=5)[1], name
        for folder in ("home", "app"):
            assert list((site.folder / name / folder).iterdir()) == []


# --- Procfile and systemd -----------------------------------------------------------------------


def same(name: str, command: Command) -> None:
    """Hold a command to that of the service of this name: where it listens is its own matter."""
    names, options = command
    expected = parse(command_of(name))
    assert names == expected[0]
    own = dict.fromkeys(("host", "port"))
    assert options | own == expected[1] | own, name


def test_the_procfile_has_the_same_processes() -> None:
    lines = (ROOT / "deploy/Procfile").read_text().splitlines()
    processes = dict(re.fullmatch(r"([a-z-]+): opscore (.+)", line).groups() for line in lines)  # type: ignore[union-attr]
    assert set(processes) == {"release", *LASTING}
    for name, line in processes.items():
        same(
            "migrate" if name == "release" else name,
            parse(shlex.split(line.replace("$PORT", "8000"))),
        )


UNITS = sorted((ROOT / "deploy/systemd").glob("*.service"))


def unit(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, value = line.split("=", 1)
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("name", [path.name for path in UNITS])
def test_each_unit_starts_a_command_and_stops_it_with_grace(name: str) -> None:
    found = unit(ROOT / "deploy/systemd" / name)
    service = name.removeprefix("opscore-").removesuffix(".service")
    (start,) = found["ExecStart"]
    program, *arguments = shlex.split(start)
    assert program == "/opt/opscore/bin/opscore"
    same(service, parse(arguments))
    assert found["User"] == ["opscore"] and found["PartOf"] == ["opscore.target"]
    assert found["EnvironmentFile"] == ["/etc/opscore/opscore.env"]
    if service == "migrate":
        assert found["Type"] == ["oneshot"]
        return
    assert found["Requires"] == ["opscore-migrate.service"]
    assert "opscore-migrate.service" in found["After"][0]
    # To the main process alone: the pool's children would die of it under their agents.
    assert found["KillMode"] == ["mixed"]
    needed = {"web": GUNICORN_GRACE_SECONDS}.get(service, GRACE_SECONDS)
    assert float(found["TimeoutStopSec"][0]) > needed


def test_the_target_wants_every_unit() -> None:
    wanted = " ".join(unit(ROOT / "deploy/systemd/opscore.target")["Wants"]).split()
    assert sorted(wanted) == [p.name for p in UNITS if p.stem != "opscore-migrate"]


# --- Kubernetes ---------------------------------------------------------------------------------

FOLDER = ROOT / "deploy/kubernetes"
MANIFESTS = [
    (path.name, document)
    for path in sorted(FOLDER.glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
]


def of_kind(kind: str) -> dict[str, Any]:
    named = [document for _, document in MANIFESTS if document["kind"] == kind]
    return {each["metadata"].get("name", "migrate"): each for each in named}


DEPLOYMENTS = of_kind("Deployment")
PODS = {name: made["spec"]["template"] for name, made in {**DEPLOYMENTS, **of_kind("Job")}.items()}


@pytest.mark.parametrize("version", ["1.32", "1.37"])
def test_every_manifest_fits_the_schema_of_kubernetes(version: str) -> None:
    for _, document in MANIFESTS:
        kubernetes_validate.validate(document, version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**MANIFESTS[0][1], "spek": {}}, version, strict=True)


def test_kubernetes_runs_the_same_processes() -> None:
    assert set(PODS) == set(OURS)
    for name, pod in PODS.items():
        (container,) = pod["spec"]["containers"]
        same(name, parse(container["args"]))
        assert container["image"] == f"opscore:{VERSION}" and container["name"] == name


@pytest.mark.parametrize("name", OURS)
def test_pods_have_no_rights_and_only_tmp_to_write_to(name: str) -> None:
    spec = PODS[name]["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] and not spec["automountServiceAccountToken"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/tmp"]
    assert "memory" in container["resources"]["limits"]


def test_pods_are_given_longer_than_they_take_to_end() -> None:
    settings = of_kind("ConfigMap")["opscore"]["data"]
    grace = float(settings["OPSCORE_GRACE_SECONDS"]) + WORKER_ENDS_SECONDS
    for name in DEPLOYMENTS:
        given = PODS[name]["spec"]["terminationGracePeriodSeconds"]
        (container,) = PODS[name]["spec"]["containers"]
        before = (
            container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        )
        assert given > before + (GUNICORN_GRACE_SECONDS if name == "web" else grace), name


def test_probes_ask_what_compose_asks() -> None:
    for name in DEPLOYMENTS:
        (container,) = PODS[name]["spec"]["containers"]
        _, *check = SERVICES[name]["healthcheck"]["test"]
        for probe in [value for key, value in container.items() if key.endswith("Probe")]:
            if "httpGet" in probe:
                (port,) = [p["containerPort"] for p in container["ports"]]
                asked = f"http://127.0.0.1:{port}{probe['httpGet']['path']}"
                assert probe["httpGet"]["port"] == "http" and check[-1] == asked
            else:
                assert probe["exec"]["command"] == check
        assert "livenessProbe" in container
        assert ("readinessProbe" in container) == (name in ("web", "flower"))


def test_every_source_of_variables_is_there() -> None:
    maps, secrets = of_kind("ConfigMap"), of_kind("Secret")
    for pod in PODS.values():
        (container,) = pod["spec"]["containers"]
        for source in container["envFrom"]:
            ((kind, ref),) = source.items()
            assert ref["name"] in {"configMapRef": maps, "secretRef": secrets}[kind]
        for variable in container.get("env", []):
            if "valueFrom" in variable:
                ref = variable["valueFrom"]["secretKeyRef"]
                assert ref["key"] in secrets[ref["name"]]["stringData"]


def test_services_and_budgets_find_their_pods() -> None:
    for name, service in of_kind("Service").items():
        (container,) = PODS[name]["spec"]["containers"]
        assert service["spec"]["selector"] == PODS[name]["metadata"]["labels"]
        assert [p["port"] for p in service["spec"]["ports"]] == [
            p["containerPort"] for p in container["ports"]
        ]
    for made in [*DEPLOYMENTS.items(), *of_kind("PodDisruptionBudget").items()]:
        name, spec = made[0], made[1]["spec"]
        assert spec["selector"]["matchLabels"] == PODS[name]["metadata"]["labels"]
    (ingress,) = of_kind("Ingress").values()
    for path in ingress["spec"]["rules"][0]["http"]["paths"]:
        assert path["backend"]["service"] == {"name": "web", "port": {"name": "http"}}


def test_the_variables_of_the_manifests_are_settings() -> None:
    given = [*of_kind("ConfigMap")["opscore"]["data"]]
    given += of_kind("Secret")["opscore"]["stringData"]
    for name in given:
        assert name in DECLARED or name.startswith("OTEL_"), name
    required = {name for name, field in DECLARED.items() if field.default is MISSING}
    assert required <= set(given)
    from flower.options import default_options

    for pod in PODS.values():
        for variable in pod["spec"]["containers"][0].get("env", []):
            assert variable["name"].removeprefix("FLOWER_").lower() in default_options


def test_some_of_each_kind_stay_while_nodes_are_emptied() -> None:
    budgets, scaled = of_kind("PodDisruptionBudget"), of_kind("HorizontalPodAutoscaler")
    for name, deployment in DEPLOYMENTS.items():
        least = scaled[name]["spec"]["minReplicas"] if name in scaled else 0
        # What an autoscaler decides is not set anew by every `kubectl apply`.
        assert ("replicas" in deployment["spec"]) == (name not in scaled)
        assert (name in budgets) == ((least or deployment["spec"]["replicas"]) > 1)


def test_workers_are_scaled_by_our_own_queue_metric() -> None:
    (scaler,) = of_kind("HorizontalPodAutoscaler").values()
    (metric,) = scaler["spec"]["metrics"]
    queue = parse(PODS["worker-agents"]["spec"]["containers"][0]["args"])[1]["queues"]
    assert metric["external"]["metric"] == {
        "name": "opscore_queue_ready",
        "selector": {"matchLabels": {"queue": queue}},
    }
    rules = of_kind("ConfigMap")["opscore-prometheus-adapter"]["data"]["config.yaml"]
    (rule,) = yaml.safe_load(rules)["externalRules"]
    assert rule["seriesQuery"] == rule["name"]["as"] == metric["external"]["metric"]["name"]


# --- docs/deploy.md -----------------------------------------------------------------------------

PAGE = (ROOT / "docs/deploy.md").read_text()


def test_the_page_shows_commands_and_settings_that_exist() -> None:
    table = PAGE[PAGE.index("| Process |") : PAGE.index("`DATABASE_URL` and")]
    shown = dict(re.findall(r"^\| ([a-z-]+) \| `opscore ([^`]+)`", table, re.MULTILINE))
    assert set(shown) == set(OURS)
    for name, line in shown.items():
        names, options = parse(shlex.split(line))
        named = {"name": name} if "queues" in options else {}  # left out there
        same(name, (names, options | named))
    for words in re.findall(r"^    opscore ([a-z ]+?) +#", PAGE, re.MULTILINE):
        parse(words.split())
    for name in re.findall(r"OPSCORE_[A-Z_]+", PAGE):
        assert name in DECLARED, name
    for name in re.findall(r"`([A-Z]+_[A-Z_]+)(?:=[^`]*)?`", PAGE):
        assert name in {*DECLARED, *SHOWN, "FLOWER_ADDRESS"}, name


def test_the_page_explains_every_folder_in_about_ten_lines() -> None:
    for title, folder in (
        ("Procfile", "deploy/Procfile"),
        ("systemd", "deploy/systemd"),
        ("Kubernetes", "deploy/kubernetes"),
    ):
        section = re.split(r"^## ", PAGE.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]
        assert f"`{folder}`" in section and (ROOT / folder).exists()
        assert 6 <= len(re.findall(r"^\d+\. ", section, re.MULTILINE)) <= 10
