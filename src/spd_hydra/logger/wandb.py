"""Weights & Biases: sees what the files record, and whatever happens to it, training goes on."""

import contextlib
import dataclasses
import json
import logging
import netrc
import os
import secrets
import socket
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

from spd_hydra import atomic
from spd_hydra.logger.base import Logger, LoggerSpec
from spd_hydra.redaction import redact, redact_command, redact_text
from spd_hydra.section import option, register

logger = logging.getLogger(__name__)

_IDENTITY_FILE = "wandb.json"
_PROBE_SECONDS = 3.0
_GRACE_SECONDS = 5.0  # beyond wandb's own time limit for its end


class Mode(Enum):
    """Whether the record is sent to the server while it is made."""

    online = "online"
    offline = "offline"


@register("logger", "wandb")
@dataclasses.dataclass(kw_only=True)
class Wandb(LoggerSpec):
    """Also record the run with Weights & Biases."""

    project: str = option("spd_hydra", "project to which the run belongs")
    entity: str | None = option(None, "user or team that owns the project; null: the default of the account")
    mode: Mode = option(Mode.online, "online, or offline to send it later with `wandb sync`")
    group: str | None = option(None, "name under which runs are grouped, e.g. one per sweep")
    tags: list[str] = option(help="labels of the run", default_factory=list)
    init_timeout: float = option(30.0, "seconds to wait for the server at the start", gt=0)
    finish_timeout: float = option(60.0, "seconds to wait for the last upload at the end", gt=0)

    def start(self, run_dir: Path, name: str, config: dict[str, Any]) -> Logger:
        """Begin the record inside the run directory, or go on with the one that is there.

        The mode is settled before anything is begun, because a record cannot change it later.
        """
        # wandb's reports about itself hold the process for ten seconds at its end when the server is silent.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb

            mode = self._settled_mode(wandb)
            if mode is None:
                return Logger()
            run = wandb.init(
                project=self.project,
                entity=self.entity,
                group=self.group,
                tags=list(self.tags),
                name=name,
                id=_run_id(run_dir),
                resume="allow",
                reinit="create_new",  # never join a record that this process has open already
                mode=mode.value,
                dir=str(run_dir),
                config=redact(config),
                settings=self._settings(wandb),
            )
        except Exception as error:
            logger.warning(
                "wandb could not be started: %s. Training goes on; the run directory records everything.",
                redact_text(str(error)),
            )
            return Logger()
        if mode is Mode.online:
            logger.info("wandb shows this run at %s", run.url)
        else:
            logger.info("wandb records this run; to send it: wandb sync %s", Path(run.dir).parent)
        return _WandbLogger(wandb, run, self.finish_timeout)

    def _settled_mode(self, wandb: Any) -> Mode | None:
        """Online only with a key and a server in reach; None where the environment switches wandb off."""
        wished = os.environ.get("WANDB_MODE", "")
        if wished == "disabled":
            logger.warning("wandb is switched off by WANDB_MODE=disabled.")
            return None
        if self.mode is Mode.offline or wished in {"offline", "dryrun"}:
            return Mode.offline
        settings = wandb.setup().settings
        server = _server_of(settings)
        if not (settings.api_key or _has_credentials(server)):
            reason = "there is no wandb key (set WANDB_API_KEY, also in a .env file, or run `wandb login`)"
        elif not _reachable(server):
            reason = f"{server} does not answer"
        else:
            return Mode.online
        logger.warning("wandb records this run offline: %s", reason)
        return Mode.offline

    def _settings(self, wandb: Any) -> Any:
        wished = {
            "init_timeout": self.init_timeout,
            "finish_timeout": self.finish_timeout,
            "console": "off",
            "silent": True,
            "save_code": False,
            "disable_code": True,
            "disable_git": True,  # the run directory has commit and diff, without secrets
            "x_disable_meta": redact_command(sys.argv)
            != sys.argv,  # wandb would send the command line as it is
        }
        known = wandb.Settings.model_fields  # finish_timeout is younger than the oldest version supported
        return wandb.Settings(**{name: value for name, value in wished.items() if name in known})


class _WandbLogger(Logger):
    """A record that was begun. Calls to wandb are fenced: the first failure is reported, none is raised."""

    def __init__(self, wandb: Any, run: Any, finish_timeout: float) -> None:
        self._wandb, self._run, self._finish_timeout = wandb, run, finish_timeout
        self.finish_seconds = finish_timeout + 2 * _GRACE_SECONDS  # `finish` gives up before
        self._warned = self._finished = False

    def log(self, step: int, split: str, values: dict[str, float]) -> None:
        row = {f"{split}/{name}": value for name, value in values.items()}
        self._fenced(lambda: self._run.log(row, step=step))

    def log_figures(self, step: int, figures: dict[str, Path]) -> None:
        def send() -> None:
            images = {f"figures/{name}": self._wandb.Image(str(path)) for name, path in figures.items()}
            self._run.log(images, step=step)

        self._fenced(send)

    def finish(self, summary: dict[str, Any] | None, exit_code: int) -> None:
        if self._finished:
            return
        self._finished = True
        if summary is not None:
            self._fenced(lambda: self._run.summary.update(redact(summary)))
        # In a thread, because a dead connection may hold it for longer than wandb's own limit.
        ending = threading.Thread(
            target=self._fenced, args=(lambda: self._run.finish(exit_code=exit_code),), daemon=True
        )
        ending.start()
        ending.join(self._finish_timeout + _GRACE_SECONDS)
        if ending.is_alive():
            self._warn(f"it did not end within {self._finish_timeout:g} s")

    def _fenced(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            self._warn(redact_text(f"{type(error).__name__}: {error}"))

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "wandb failed: %s. Training goes on; the run directory records everything, and further "
                "failures of wandb are not reported.",
                reason,
            )


def _server_of(settings: Any) -> str:
    return str(settings.base_url)


def _run_id(run_dir: Path) -> str:
    """The id that the run directory remembers, so that a resumed run goes on in the same record."""
    path = run_dir / _IDENTITY_FILE
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        return str(json.loads(path.read_text())["id"])
    # A wandb sweep gives each run its id; another program of the environment may have left one behind.
    given = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
    identity = given or secrets.token_hex(4)
    atomic.replace(path, json.dumps({"id": identity}))
    return identity


def _has_credentials(server: str) -> bool:
    """Whether wandb would find a key by itself: it asks at the terminal when it does not."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urllib.parse.urlsplit(server).netloc
    places = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for place in [place for place in places if place]:
        with contextlib.suppress(OSError, netrc.NetrcParseError, RuntimeError):
            return netrc.netrc(Path(place).expanduser()).authenticators(host) is not None
    return False


def _reachable(server: str) -> bool:
    """Whether something listens where the record would be sent: at the server or at the proxy before it."""
    address = urllib.parse.urlsplit(server)
    proxy = urllib.request.getproxies().get(address.scheme)
    if proxy and not urllib.request.proxy_bypass(address.hostname or ""):
        address = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    target = (address.hostname or "", address.port or (443 if address.scheme == "https" else 80))
    answered = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError), socket.create_connection(target, timeout=_PROBE_SECONDS):
            answered.set()

    # In a thread, because looking up a name has no time limit of its own.
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(_PROBE_SECONDS)
    return answered.is_set()
