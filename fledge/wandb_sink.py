"""The same numbers, told to wandb; metrics.jsonl stays the truth.

Nothing here raises because of wandb: whatever fails in it costs the run its page there and one sentence. It is sent no
code, no arguments and no host data.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fledge.errors import InputError
from fledge.records import read_json, write_json
from fledge.redact import redact

if TYPE_CHECKING:
    from fledge.artifact import Artifact
    from fledge.track import TrackConfig

CARD = ("manifest.json", "README.md", "config.yaml")  # of an artifact: what it is, without its weights


def wandb_mode(wish: str) -> str:
    """online, offline or off. WANDB_MODE counts where the config says auto. InputError: online, but no key anywhere."""
    if wish == "off":
        return "off"
    if wish == "auto":
        asked = os.environ.get("WANDB_MODE", "").lower()
        if asked in ("disabled", "off"):
            return "off"
        wish = asked if asked in ("online", "offline") else ("online" if _has_key() else "offline")
        return "offline" if wish == "online" and not _has_key() else wish
    if wish == "online" and not _has_key():
        raise InputError(
            "track.wandb: online, but there is no key: set WANDB_API_KEY, run `wandb login` once, or write "
            "track.wandb: auto, which logs offline until there is one."
        )
    return wish


def _has_key() -> bool:
    """A key in the environment, or an entry for the server in netrc. Nobody is asked and nothing is kept."""
    import netrc
    from urllib.parse import urlparse

    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    asked = os.environ.get("NETRC")
    for path in [Path(asked)] if asked else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(str(path)).hosts.get(host):
                return True
    return False


class Wandb:
    """One run there.

    `wandb.json` in the run folder keeps the id, so that a resumed run goes on as the same one; the last step told; and
    the step up to which what was told stands: on a server, or in an offline folder that has been synced. Where an
    earlier attempt is only in an offline folder, that folder is set aside and its steps are told again from
    metrics.jsonl. So there is one folder to sync, and no step is there twice, whatever was killed and however often.
    """

    def __init__(self, folder: Path, track: TrackConfig, name: str, say: Callable[[str], None]):
        self.folder, self.track, self.name, self._say = folder, track, track.label or name, say
        kept = read_json(folder / "wandb.json", {"id": uuid.uuid4().hex[:12], "last_step": -1})
        self.id, self.last, self.stands = kept["id"], kept["last_step"], kept.get("stands", -1)
        self.run: Any = None
        self.mode = ""

    def start(self, mode: str, config: dict[str, Any]) -> None:
        """Open the run there. A server out of reach is no reason to lose the numbers: then they are kept offline."""
        earlier = [p for p in self.folder.glob(f"wandb/offline-run-*-{self.id}") if not any(p.glob("*.synced"))]
        for self.mode in dict.fromkeys([mode, "offline"]):
            self.run = self._guard(f"could not start {self.mode}", lambda: self._init(config))
            if self.run is not None:
                break
        else:
            return
        for folder in earlier:
            folder.rename(folder.with_name(f"superseded-{folder.name}"))
        if self.mode == "online":  # the server knows best what it has
            self.last = self.run.starting_step - 1 if self.run.resumed else -1
        elif earlier:
            self.last = self.stands
        self.stands = self.last
        self._keep()

    def _init(self, config: dict[str, Any]) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        quiet = wandb.Settings(
            silent=True, console="off", init_timeout=30, save_code=False, disable_code=True, disable_git=True,
            disable_job_creation=True, x_disable_meta=True, x_disable_machine_info=True, x_save_requirements=False,
            x_disable_stats=self.mode == "offline",
        )  # fmt: skip
        mode: Any = self.mode
        return wandb.init(
            project=self.track.project, group=self.track.group or None, tags=self.track.tags or None, name=self.name,
            job_type=config.get("stage"), id=self.id, resume="allow", mode=mode, dir=str(self.folder), config=config,
            reinit="create_new", settings=quiet,
        )  # fmt: skip

    def catch_up(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Tell what metrics.jsonl holds of earlier attempts, as far as it was not told or does not stand."""
        missing = [record for record in records if record["step"] > self.last]
        if self.run is None or not missing:
            return
        self._reach(missing[-1]["step"])
        for record in missing:
            odd = {"step": None, "nonfinite": None, **record.get("nonfinite", {})}
            self.send(record["step"], {key: odd.get(key, value) for key, value in record.items()})

    def send(self, step: int, values: Mapping[str, Any]) -> None:
        """Tell the numbers of `step`, unless they stand there already."""
        if self.run is None or step <= self.stands:
            return
        self._reach(step)
        numbers = {key: float(value) for key, value in values.items() if value is not None}
        self._guard("stopped taking numbers", lambda: self.run.log(numbers, step=step))

    def media(self, name: str, make: Callable[[Any], Any]) -> None:
        """Show `make(wandb)` as media/NAME beside the newest step, or the first that does not stand there already."""
        if self.run is None:
            return
        import wandb

        step = max(self.last, self.stands + 1)
        self._reach(step)
        self._guard(f"did not take {name}", lambda: self.run.log({f"media/{name}": make(wandb)}, step=step))

    def summary(self, values: Mapping[str, float]) -> None:
        """What the run came to: its scores."""
        if self.run is not None:
            self._guard("did not take the scores", lambda: self.run.summary.update(dict(values)), ends=False)

    def _reach(self, step: int) -> None:
        """Noted before it is told: what is killed in between is synced at most once."""
        if step > self.last:
            self.last = step
            self._keep()

    def lineage(self, made: Artifact, parents: Mapping[str, Artifact]) -> None:
        """Online: what this run made, and what it was raised from.

        A parent is described by the same files as its own run did, so that wandb finds it to be the version that it
        has already; one that it has never seen (imported, or made offline) is added.
        """
        if self.run is None or self.mode != "online":
            return
        for parent in parents.values():
            self._guard(
                f"did not take the parent {parent.name}",
                lambda p=parent: self.run.use_artifact(self._card(p)),
                ends=False,
            )
        self._guard(
            "did not take the artifact",
            lambda: self.run.log_artifact(self._card(made), aliases=["latest", made.digest[:12]]),
            ends=False,
        )

    def _card(self, artifact: Artifact) -> Any:
        """An artifact as wandb's: manifest, model card and config; weights and the rest only where that is asked."""
        import wandb

        facts = {"digest": artifact.digest, "stage": artifact.stage, "step": artifact.step, "scores": artifact.scores}
        card = wandb.Artifact(artifact.name, type=artifact.kind, metadata=facts)
        names = ["manifest.json", *artifact.manifest["files"]] if self.track.upload_weights else CARD
        for name in names:
            card.add_file(str(artifact.path / name), name=name)
        return card

    def finish(self, failed: bool = False) -> None:
        if self.run is not None:
            run = self.run
            self._guard("did not finish", lambda: run.finish(exit_code=int(failed)))
        self.run = None

    def _keep(self) -> None:
        stands = self.last if self.mode == "online" else self.stands
        write_json(self.folder / "wandb.json", {"id": self.id, "last_step": self.last, "stands": stands})

    def _guard(self, what: str, act: Callable[[], Any], ends: bool = True) -> Any:
        """Call wandb. Any error of it, of whatever type, costs a sentence and, if it `ends`, the run its page there."""
        try:
            return act()
        except Exception as error:  # noqa: BLE001  (third party: network, service process, disk; none may end training)
            first = redact((str(error).strip().splitlines() or [""])[0])[:200]
            self._say(f"wandb {what} ({type(error).__name__}: {first}); metrics.jsonl has everything")
            if ends:
                self.run = None
            return None
