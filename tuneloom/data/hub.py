"""Data sets of a hub to local files: Hugging Face's through `datasets`, ModelScope's through its own client.

Both are optional: `pip install 'tuneloom[hub]'`, `pip install 'tuneloom[modelscope]'`. HF_ENDPOINT names
another hub; HF_HUB_OFFLINE=1 keeps to the copies on this machine. No code of a data set is ever run.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tuneloom.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
MODELSCOPE = "modelscope://"

_SECRET = re.compile(r"hf_[A-Za-z0-9]{8,}|(?<=Bearer )\S+|(?<=//)[^/\s@]+(?=@)")

T = TypeVar("T")


def hub_files(repo: str, subset: str | None, split: str, revision: str | None) -> list[tuple[str, Path]]:
    """Return the Arrow files of a split of a set on the Hugging Face hub, downloading what is missing.

    The hub is asked once for the commit that `revision` means before anything else, so that a wrong id and a
    missing network are told at once: the client would try again for minutes.

    Raises:
        UserError: `datasets` is not installed, there is no such set, subset, split or revision, no network, or
            the set's files cannot be read.
    """
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            "data not found",
            where=repo,
            got="no such file or folder, and sets of a hub need the package `datasets`",
            mend="check the path, or: pip install 'tuneloom[hub]'",
        )
    import datasets

    datasets.disable_progress_bars()
    commit = _commit(repo, revision)
    builder = _tried(repo, lambda: _builder(repo, subset, commit))
    _same_revision(repo, builder.hash, commit, revision)
    _tried(repo, builder.download_and_prepare)
    splits = list(builder.info.splits or ())
    if split not in splits:
        raise UserError(
            "the data set has no such split",
            where=repo,
            got=f"split: {split}",
            expected=", ".join(splits) or "at least one split",
            mend="set the source's `split`",
        )
    found: Any = _tried(repo, lambda: builder.as_dataset(split=split))
    files = [Path(file["filename"]) for file in found.cache_files]
    if not files:
        raise UserError("the split is empty", where=repo, got=f"split: {split}", mend="take another split")
    shown = f"{repo}{f'/{subset}' if subset else ''}[{split}]"
    return [(shown if len(files) == 1 else f"{shown} {number}", file) for number, file in enumerate(files, 1)]


def modelscope_folder(repo: str, revision: str | None) -> Path:
    """Return the local copy of a set on ModelScope, downloading what is missing.

    Raises:
        UserError: `modelscope` is not installed, there is no such set, or no network.
    """
    where = f"{MODELSCOPE}{repo}"
    if not HUB_ID.fullmatch(repo):
        raise UserError("not the id of a data set", where=where, expected=f"{MODELSCOPE}owner/name", mend="write its whole id")
    if importlib.util.find_spec("modelscope") is None:
        raise UserError(
            "sets of ModelScope need the package `modelscope`", where=where, mend="pip install 'tuneloom[modelscope]'"
        )
    from modelscope import dataset_snapshot_download

    try:
        # Older clients take no revision of None.
        return Path(dataset_snapshot_download(repo, **({"revision": revision} if revision else {})))
    except Exception as error:  # the client passes on whatever the network raises
        raise UserError(
            "data not found",
            where=where,
            got=f"ModelScope gave: {_told(error)}",
            mend="check the id, the source's `revision`, and the network",
        ) from error


def _commit(repo: str, revision: str | None) -> str | None:
    """Ask the hub once which commit a revision is; None where HF_HUB_OFFLINE keeps it from being asked."""
    from huggingface_hub import HfApi, constants, errors

    try:
        info: Any = HfApi().dataset_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT, expand=["sha"])
        return str(info.sha)
    except errors.OfflineModeIsEnabled:
        return None
    except errors.RevisionNotFoundError as error:
        raise UserError(
            "the data set has no such revision",
            where=repo,
            got=f"revision: {revision}",
            mend="give a branch, tag or commit of it, or leave `revision` out",
        ) from error
    except (errors.RepositoryNotFoundError, errors.DisabledRepoError, errors.HFValidationError) as error:
        raise UserError(
            "data not found",
            where=repo,
            got=f"no such file or folder, and no such set on {_shown(constants.ENDPOINT)} that may be read",
            mend="check the path or id; a private set needs the token of `hf auth login`",
        ) from error
    except Exception as error:  # the client passes on whatever the network raises
        raise UserError(
            "data not found",
            where=repo,
            got=f"no such file or folder, and {_shown(constants.ENDPOINT)} does not answer: {_told(error)}",
            mend="check the path or the network, set HF_ENDPOINT to a mirror, or HF_HUB_OFFLINE=1 for a copy on this machine",
        ) from error


def _builder(repo: str, subset: str | None, commit: str | None) -> Any:
    """Return what makes the files of a subset.

    Raises:
        UserError: there is no such subset, or it must be named; offline: no copy of the set.
    """
    import datasets

    try:
        return datasets.load_dataset_builder(repo, name=subset, revision=commit)
    except ConnectionError as error:
        if commit:
            raise
        raise UserError(
            "data not found",
            where=repo,
            got="no such file or folder, and no copy of such a set of the hub on this machine",
            mend="check the path or id; to download it, unset HF_HUB_OFFLINE",
        ) from error
    except ValueError as error:
        names = datasets.get_dataset_config_names(repo, revision=commit) if commit else []
        if not names or subset in names:
            raise
        raise UserError(
            "the data set has no such subset" if subset else "the data set has several subsets",
            where=repo,
            got=f"subset: {subset}" if subset else "no subset",
            expected=", ".join(map(str, names)),
            mend="set the source's `subset`",
        ) from error


def _same_revision(repo: str, found: str, commit: str | None, revision: str | None) -> None:
    """Refuse a copy of another revision than asked for: where it fails, the client takes the newest copy it has.

    Raises:
        UserError: it is, or offline it cannot be known.
    """
    if commit is None and revision not in (None, "main", found):
        raise UserError(
            "the copy on this machine may be of another revision",
            where=repo,
            got=f"revision: {revision}, and a copy of commit {found}",
            mend=f"unset HF_HUB_OFFLINE, or set the source's `revision` to {found}",
        )
    if commit is not None and found != commit:
        raise UserError(
            "the data set cannot be read",
            where=repo,
            got=f"nothing of commit {commit}, and a copy of commit {found}",
            mend=f"set the source's `revision` to {found}, or download the files and name them",
        )


def _tried(repo: str, step: Callable[[], T]) -> T:
    try:
        return step()
    except UserError:
        raise
    except Exception as error:  # the client passes on whatever its readers, its cache and the network raise
        from huggingface_hub import constants

        offline = constants.HF_HUB_OFFLINE
        raise UserError(
            "the data set cannot be read",
            where=repo,
            got=_told(error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error),
            mend="unset HF_HUB_OFFLINE: there is no whole copy on this machine"
            if offline
            else "download the files that you want and name them",
        ) from error


def _told(error: BaseException) -> str:
    """Return the first lines of an error, without secrets."""
    text = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
    return _SECRET.sub("***", text or type(error).__name__)[:200]


def _shown(endpoint: str) -> str:
    return _SECRET.sub("***", endpoint)
