"""A model registry: resolve what a user names, read and move aliases, fetch a version's files."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient
from pydantic import BaseModel, ValidationError

from models.errors import RegistryError, did_you_mean
from models.saved.allowed_files import SPEC_FILE, check_folder, check_names
from models.saved.folder import folder_digest
from pipelines.tracking.mlflow_runs import connect, store_errors

M = TypeVar("M", bound=BaseModel)

# Versions requested at once; MLflow cuts longer answers into pages.
PAGE = 1000
# Tag of a version: digest of its saved folder.
# Tag of versions that differ in their seed alone: the same for all of them.
GROUP = "seeds_of"
DIGEST = "digest"
# Registered model that holds every move of an alias, see pipelines.journal.
JOURNAL = "planes-journal"
# Tag of what is no model but the journal of one, see pipelines.journal.
JOURNAL_OF = "planes_journal_of"
MAX_ENTRIES = 20


def group_name(versions: Sequence[str]) -> str:
    """What `Registry.group` takes for these versions.

    >>> group_name(["4", "5", "6"]), group_name(["16", "2"])
    ('4..6', '2,16')
    """
    numbers = sorted(map(int, versions))
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]}..{numbers[-1]}" if whole and len(numbers) > 1 else ",".join(map(str, numbers))


@dataclass(frozen=True)
class Resolved:
    """A registered version or a saved folder, and how it was named.

    ``name`` and ``version`` are None for a folder, ``folder`` is None for a version;
    ``digest`` is that of the version's saved folder, as its tag says.
    """

    text: str
    name: str | None = None
    version: str | None = None
    run_id: str | None = None
    model_id: str | None = None
    folder: Path | None = None
    digest: str | None = None

    @property
    def label(self) -> str:
        """Short name for tables: ``planes-det/3`` or the folder's name."""
        return f"{self.name}/{self.version}" if self.name else (self.folder.name if self.folder else self.text)


@dataclass(frozen=True)
class Registry:
    """A model registry and the tracking store behind it, reached through the client that is held.

    Several may be used side by side: nothing here reads or sets MLflow's global address.
    Credentials are read from the environment, where MLflow looks for them.
    """

    client: MlflowClient

    @classmethod
    def connect(cls, uri: str | None = None) -> Registry:
        """Open the registry at ``uri``, else that of ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the working folder.

        Raises:
            RegistryError: it cannot be reached.
        """
        return cls(connect(uri))

    @property
    def uri(self) -> str:
        """Address of the tracking store."""
        return str(self.client.tracking_uri)

    def resolve(self, text: str) -> Resolved:
        """Find what ``text`` names.

        A saved folder; ``name/3`` (version), ``name/Production`` (alias, else stage, in any
        case), ``name/latest``, ``name@alias``, each with or without ``models:/`` before it.

        Raises:
            RegistryError: nothing of that name (listing what exists), or two aliases that
                differ only in case.
        """
        if (Path(text) / SPEC_FILE).is_file():
            return Resolved(text, folder=Path(text))
        plain = re.sub(r"^models:/+", "", text)
        name, sign, what = plain.partition("@") if "@" in plain else plain.partition("/")
        if not sign or not name or not what or "/" in what:
            raise RegistryError(
                f"model {text!r}: expected a saved folder, NAME/VERSION, NAME/ALIAS or NAME@ALIAS; {self._known_models()}"
            )
        versions = self.versions_of(name)
        if not versions:
            raise RegistryError(f"model {text!r}: {self.no_such_model(name)}")
        version = self._pick(name, what, sign == "@", versions)
        if version is not None and JOURNAL_OF in version.tags:
            raise RegistryError(f"model {text!r}: is the journal of {version.tags[JOURNAL_OF]}, not a model")
        if version is None:
            raise RegistryError(
                f"model {text!r}: {name} has no version, alias or stage {what!r}"
                f"{did_you_mean(what.lower(), ['latest', *self.aliases_of(name)]) or ';'} {self.describe(name, versions)}"
            )
        digest = version.tags.get(DIGEST)
        return Resolved(text, name, str(version.version), version.run_id, self.logged_model_id(version), digest=digest)

    def group(self, text: str) -> list[str]:
        """The versions of a group, ``name/3..5`` or ``name/3,5,8``, as ``name/3`` and so on; any other text by itself.

        Versions that were deleted are left out.

        Raises:
            RegistryError: no version of the group exists.
        """
        match = re.fullmatch(r"(?:models:/+)?([^/@]+)/(\d+(?:\.\.\d+)?(?:,\d+(?:\.\.\d+)?)*)", text)
        if match is None or match[2].isdigit():
            return [text]
        name, ranges = match[1], [part.partition("..") for part in match[2].split(",")]
        known = sorted(int(v.version) for v in self.versions_of(name))
        chosen = [n for n in known if any(int(low) <= n <= int(high or low) for low, _, high in ranges)]
        if not chosen:
            raise RegistryError(f"model {text!r}: no version of {name} among {match[2]}; {self._known_models()}")
        return [f"{name}/{number}" for number in chosen]

    def logged_model_id(self, version: ModelVersion) -> str | None:
        """MLflow's id of the logged model behind a version; SQL stores tell it by the version's source only.

        That of a copy names the version it was copied from.
        """
        for _ in range(10):
            match = re.search(r"^models:/(?:(m-\w+)|([^/]+)/(\d+))$", version.source or "")
            if version.model_id or match is None or match[1]:
                break
            try:
                version = self.client.get_model_version(match[2], match[3])
            except mlflow.MlflowException:
                return None
        return version.model_id or (match[1] if match else None)

    def version_of(self, resolved: Resolved) -> ModelVersion:
        """MLflow's record of a registered version, with its tags.

        Raises:
            RegistryError: a folder, or the store refuses.
        """
        if resolved.name is None or resolved.version is None:
            raise RegistryError(f"{resolved.text}: a saved folder; name a registered version, such as planes-det/3")
        with store_errors(f"{resolved.label}: cannot be read from the registry"):
            return self.client.get_model_version(resolved.name, resolved.version)

    def _pick(self, name: str, what: str, alias_only: bool, versions: Sequence[ModelVersion]) -> ModelVersion | None:
        by_number = {str(v.version): v for v in versions}
        if not alias_only and re.fullmatch(r"v?\d+", what):
            return by_number.get(what.removeprefix("v"))
        number = self.find_alias(name, what)
        if number is not None:
            return by_number.get(number)
        if alias_only:
            return None
        if what.lower() == "latest":
            return max(versions, key=lambda v: int(v.version))
        # Stages are deprecated in MLflow; a server that still has them is heard last.
        staged = [v for v in versions if (v.current_stage or "None").lower() == what.lower() != "none"]
        return max(staged, key=lambda v: int(v.version), default=None)

    def find_alias(self, name: str, alias: str) -> str | None:
        """The version number that an alias, in any case, points to; None where there is none.

        Raises:
            RegistryError: two aliases differ only in case and point to different versions.
        """
        same = {k: str(v) for k, v in self.aliases_of(name).items() if k.lower() == alias.lower()}
        if len(set(same.values())) > 1:
            listed = ", ".join(f"{k} -> {v}" for k, v in sorted(same.items()))
            raise RegistryError(f"{name}: aliases that differ only in case ({listed}); delete all but the lower-case one")
        return next(iter(same.values()), None)

    def aliases_of(self, name: str) -> dict[str, str]:
        """Alias -> version number of a registered model.

        Raises:
            RegistryError: no such model, or the store refuses.
        """
        with store_errors(f"{name}: cannot be read from the registry"):
            try:
                return {k: str(v) for k, v in self.client.get_registered_model(name).aliases.items()}
            except mlflow.MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                raise RegistryError(self.no_such_model(name)) from error

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Point an alias, in lower case, to a version; other spellings of it follow first and are removed at last.

        So that whoever reads the alias meanwhile, in any spelling, finds the old or the new version.

        Raises:
            RegistryError: the store refuses.
        """
        client = self.client
        written = alias.lower()
        others = [a for a in self.aliases_of(name) if a.lower() == written and a != written]
        with store_errors(f"{name}: {written} cannot be moved"):
            for spelling in (*others, written):
                client.set_registered_model_alias(name, spelling, version)
            for other in others:
                client.delete_registered_model_alias(name, other)

    def seeds_of(self, version: ModelVersion) -> list[ModelVersion]:
        """The versions that were trained with one, differing in their seed alone; itself where there are no others.

        Of a seed that was trained again the newest, or the version itself: the same seed twice would make the noise look
        smaller.
        """
        group = version.tags.get(GROUP)
        if group is None:
            return [version]
        known = [v for v in self.versions_of(version.name) if v.tags.get(GROUP) == group]
        by_seed = {v.tags.get("seed"): v for v in sorted(known, key=lambda v: int(v.version))}
        by_seed[version.tags.get("seed")] = version
        return list(by_seed.values())

    def set_tags(self, version: ModelVersion, tags: Mapping[str, str]) -> None:
        """Set tags of a version that differ from those it has.

        Raises:
            RegistryError: the store refuses.
        """
        with store_errors(f"{version.name}/{version.version}: cannot be tagged"):
            for key, value in tags.items():
                if version.tags.get(key) != value:
                    self.client.set_model_version_tag(version.name, str(version.version), key, value)

    def find_trained(self, name: str, key: str) -> ModelVersion | None:
        """The newest version that was trained with this key (recipe, data, code), if any."""
        matching = [v for v in self.versions_of(name) if v.tags.get("training_key") == key and v.status == "READY"]
        # One whose evaluation failed is evaluated again, not reused.
        matching = [v for v in matching if v.tags.get("evaluation", "complete") == "complete"]
        return max(matching, key=lambda v: int(v.version), default=None)

    def describe(self, name: str, versions: Sequence[ModelVersion] | None = None) -> str:
        """What exists under a name: ``versions 1-3; aliases production -> 2``."""
        versions = self.versions_of(name) if versions is None else versions
        numbers = sorted(int(v.version) for v in versions)
        listed = ", ".join(map(str, numbers)) if len(numbers) < 8 else f"{numbers[0]} to {numbers[-1]}"
        aliases = ", ".join(f"{k} -> {v}" for k, v in sorted(self.aliases_of(name).items())) or "none"
        return f"versions: {listed}; aliases: {aliases}"

    def versions_of(self, name: str) -> list[ModelVersion]:
        """All versions of a registered model.

        Raises:
            RegistryError: the store refuses.
        """
        quoted = name.replace("'", "")
        with store_errors(f"{name}: cannot be read from the registry"):
            return self.search_versions(f"name = '{quoted}'")

    def search_versions(self, condition: str) -> list[ModelVersion]:
        """All versions that a filter of MLflow's finds, however many, the highest numbers first.

        Raises:
            mlflow.MlflowException: the store refuses.
        """
        versions: list[ModelVersion] = []
        token = None
        while True:
            page = self.client.search_model_versions(condition, max_results=PAGE, page_token=token)
            versions += page
            token = page.token
            if not token:
                return sorted(versions, key=lambda v: -int(v.version))

    def registered_names(self) -> list[str]:
        """Names of the registered models, without the journals of promotions."""
        names: list[str] = []
        token = None
        while True:
            page = self.client.search_registered_models(max_results=100, page_token=token)
            names += [m.name for m in page if JOURNAL_OF not in m.tags]
            token = page.token
            if not token:
                return sorted(names)

    def no_such_model(self, name: str) -> str:
        """The message for a name that nothing is registered by, with the nearest one and all."""
        try:
            near = did_you_mean(name, self.registered_names())
        except mlflow.MlflowException:
            near = ""
        return f"no registered model {name!r}{near or ';'} {self._known_models()}"

    def _known_models(self) -> str:
        try:
            names = self.registered_names()
        except mlflow.MlflowException:
            names = []
        return f"registered: {', '.join(names)}" if names else "nothing is registered here yet; train a model first"

    def fetch(self, resolved: Resolved) -> Path:
        """Local saved folder of what was resolved; where the artefacts are elsewhere, downloaded once and kept by digest.

        Raises:
            RegistryError: the artefacts are gone, hold no saved model of ours, or are not what
                the version's digest says.
        """
        if resolved.folder is not None:
            return resolved.folder
        uri = f"models:/{resolved.name}/{resolved.version}"
        if resolved.digest is not None and not re.fullmatch(r"[0-9a-f]{16,64}", resolved.digest):
            raise RegistryError(f"{uri}: its tag {DIGEST} is no digest ({resolved.digest!r:.80}); do not use it")
        return self._fetch(
            uri,
            resolved.digest,
            lambda: self.client.get_model_version_download_uri(str(resolved.name), str(resolved.version)),
        )

    def fetch_logged(self, model_id: str, digest: str, title: str) -> Path:
        """As `fetch`, of a model that is logged and not registered; ``title`` begins the error message."""
        return self._fetch(title, digest, lambda: self.client.get_logged_model(model_id).artifact_location)

    def _fetch(self, uri: str, digest: str | None, find_source: Callable[[], str]) -> Path:
        kept = cache_folder() / digest if digest else None
        if kept is not None and _is_whole(kept):
            return kept
        with store_errors(f"{uri}: its artefacts cannot be fetched", OSError):
            source = find_source()
            local = Path(source.removeprefix("file://"))
            if local.is_dir():
                return _checked(local, uri, digest)
            artifacts = self._artifacts(source)
            inside = _saved_folder(artifacts, uri)
            if kept is None:
                return _checked(Path(artifacts.download_artifacts(inside)), uri, None)
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".download-") as into:
                saved = _checked(Path(artifacts.download_artifacts(inside, into)), uri, digest)
                # Another process may have been faster, and be reading it.
                if not _is_whole(kept):
                    shutil.rmtree(kept, ignore_errors=True)
                    saved.rename(kept)
        return kept

    def read_artifact(self, version: Resolved, name: str, most_bytes: int) -> bytes | None:
        """A file that lies beside a version's saved folder; None where it has none.

        Raises:
            RegistryError: the artefacts cannot be read, a link, or larger than ``most_bytes``.
        """
        uri = f"models:/{version.name}/{version.version}"
        with store_errors(f"{uri}: its artefacts cannot be fetched", OSError):
            source = self.client.get_model_version_download_uri(str(version.name), str(version.version))
            local = Path(source.removeprefix("file://"))
            if local.is_dir():
                path = local / "artifacts" / name
                if not os.path.lexists(path):
                    return None
                size = -1 if path.is_symlink() or not path.is_file() else path.stat().st_size
            else:
                entries = self._artifacts(source).list_artifacts("artifacts")
                sizes = [int(e.file_size or 0) for e in entries if e.path == f"artifacts/{name}"]
                if not sizes:
                    return None
                size = sizes[0]
            if not 0 <= size <= most_bytes:
                raise RegistryError(f"{uri}: its {name} is no plain file of at most {most_bytes:,} bytes; do not use it")
            if not local.is_dir():
                path = Path(self._artifacts(source).download_artifacts(f"artifacts/{name}"))
            return path.read_bytes()

    def read_parsed(self, version: Resolved, name: str, kind: type[M], most_bytes: int) -> M | None:
        """A JSON file of a version's artefacts as a pydantic model; None where there is none.

        Raises:
            RegistryError: the artefacts cannot be read, or the file is no such JSON.
        """
        content = self.read_artifact(version, name, most_bytes)
        if content is None:
            return None
        try:
            return kind.model_validate_json(content)
        except ValidationError as error:
            raise RegistryError(f"{version.label}: its {name} is damaged") from error

    def _artifacts(self, source: str) -> ArtifactRepository:
        """The files at a version's download address, reached through this registry's server."""
        return get_artifact_repository(source, tracking_uri=self.uri)


def cache_folder() -> Path:
    """Where downloaded versions are kept: ``PLANES_CACHE``, or ``planes/versions`` in the user's cache folder."""
    given = os.environ.get("PLANES_CACHE")
    return (
        Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "planes" / "versions"
    )


def _is_whole(kept: Path) -> bool:
    return (kept / SPEC_FILE).is_file() and folder_digest(kept).startswith(kept.name)


def _checked(local: Path, uri: str, digest: str | None) -> Path:
    """The saved folder in a version's local files (or those files, where they are it), nothing but what was registered."""
    specs = [local / SPEC_FILE] if (local / SPEC_FILE).exists() else list(local.glob(f"artifacts/*/{SPEC_FILE}"))
    if len(specs) != 1:
        raise RegistryError(f"{uri}: not a version made by this project (no artifacts/*/{SPEC_FILE})")
    saved = specs[0].parent
    check_folder(saved)
    if saved.is_symlink():
        raise RegistryError(f"{uri}: {saved.name} is a link; a saved model holds its files itself; do not use it")
    if digest is not None and not folder_digest(saved).startswith(digest):
        raise RegistryError(f"{uri}: its files are not those that were registered (digest {digest}); do not use it")
    return saved


def _saved_folder(artifacts: ArtifactRepository, uri: str) -> str:
    """Path of the saved folder in a version that is elsewhere; what would be downloaded is checked first."""
    folders = [f.path for f in artifacts.list_artifacts("artifacts") if f.is_dir]
    if len(folders) != 1 or not re.fullmatch(r"artifacts/[\w.-]*\w[\w.-]*", folders[0]):
        raise RegistryError(f"{uri}: not a version made by this project (no artifacts/*/{SPEC_FILE})")
    files, left = [], [folders[0]]
    while left:
        for entry in artifacts.list_artifacts(left.pop()):
            files.append((entry.path.removeprefix(f"{folders[0]}/"), int(entry.file_size or 0)))
            if entry.is_dir:
                files.pop()
                left.append(entry.path)
        if len(files) + len(left) > MAX_ENTRIES:
            raise RegistryError(f"{uri}: holds more than {MAX_ENTRIES} files; no saved model does")
    check_names(files, uri)
    return folders[0]
