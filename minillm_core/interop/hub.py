"""Uploads a folder to the Hugging Face Hub, as one commit."""

import logging
import re
import shlex
from pathlib import Path
from types import ModuleType

from minillm_core.errors import InputError, missing_package
from minillm_core.text.tokenizer import CHAT_TEMPLATES, TOKENIZER_FILES

logger = logging.getLogger(__name__)

LOGIN = (
    "run `hf auth login` with a token that may write (https://huggingface.co/settings/tokens), or set HF_TOKEN to it"
)

LONGEST_NAME = 96
"""Characters that the Hub allows in OWNER/NAME."""

_WEIGHTS = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")

_ALSO_LOADED = ("adapter_config.json", "added_tokens.json")
"""An adapter names the model to load in place of this one; the other is a tokenizer file of older versions."""


def check_repo(repo: str) -> None:
    """Raises InputError if a text is not OWNER/NAME, as the Hub allows it."""
    part = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
    is_valid = re.fullmatch(f"{part}/{part}", repo) and "--" not in repo and ".." not in repo
    if not is_valid or repo.endswith(".git") or len(repo) > LONGEST_NAME:
        hint = "OWNER is your user name on the Hub or an organisation; allowed are letters, digits and single - _ ."
        raise InputError("not the name of a repository", expected="OWNER/NAME", found=repr(repo), hint=hint)


def check_access() -> None:
    """Checks what can be known before an upload.

    Raises:
        InputError: huggingface_hub is not installed, is set to offline mode, or has no token; or the Hub refuses the
            token. A Hub that cannot be reached now is no error.
    """
    hub = _huggingface_hub()
    if hub.constants.HF_HUB_OFFLINE:
        hint = "unset HF_HUB_OFFLINE, or leave out the repository and upload the folder later"
        raise InputError("uploads are switched off", found="HF_HUB_OFFLINE=1 in the environment", hint=hint)
    if hub.get_token() is None:
        raise InputError("no token for the Hugging Face Hub", hint=LOGIN)
    try:
        hub.HfApi().whoami()
    except Exception as error:  # those of the HTTP client too, which differ between versions of huggingface_hub
        if _status(error) in (401, 403):
            raise InputError("the Hub refuses the token", found=_one_line(error), hint=LOGIN) from error
        logger.warning(f"the Hub cannot be asked about the token now: {_one_line(error)}")


def upload_command(folder: Path, repo: str, *, private: bool = False) -> str:
    """The command of huggingface_hub that uploads a folder later."""
    return shlex.join(["hf", "upload", repo, str(folder), ".", *["--private"] * private])


def upload(folder: Path, repo: str, *, private: bool = False) -> str:
    """Creates a repository, if there is none, and uploads a folder to it in one commit.

    Files of the repository with the same name are replaced. Weights and tokenizer files that the folder does not have
    are deleted in the same commit, because they would be loaded together with, or instead of, the new ones. All other
    files stay.

    Args:
        private: only the owner can see the repository.

    Returns:
        the address of the commit.

    Raises:
        InputError: the Hub cannot be reached or refuses the upload, or the repository is public where a private one is
            wanted. The folder is complete, and the repository has either all of it or nothing.
    """
    hub = _huggingface_hub()
    try:
        api = hub.HfApi()
        api.create_repo(repo, private=private or None, exist_ok=True)
        found = api.repo_info(repo)
        if not private or found.private:
            names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            others = set(api.list_repo_files(repo)) - {*names, ".gitattributes"}
            stale = sorted(name for name in others if _is_loaded(name))
            if others:
                kept = ", ".join(sorted(others - {*stale})) or "none"
                logger.info(f"{repo} has further files; deleted: {', '.join(stale) or 'none'}; kept: {kept}")
            operations = [hub.CommitOperationAdd(name, folder / name) for name in names]
            operations += [hub.CommitOperationDelete(name) for name in stale]
            message = "Upload the model"
            commit = api.create_commit(repo, operations, commit_message=message, parent_commit=found.sha)
            return str(commit.commit_url)
    except Exception as error:  # those of the HTTP client too, which differ between versions of huggingface_hub
        status, hint = _status(error), f"when the problem is solved: {upload_command(folder, repo, private=private)}"
        # without an answer, the last request may have been carried out
        problem = "the upload failed; the folder is complete" + " and nothing was committed" * (status is not None)
        if status in (401, 403):
            problem = "the Hub refuses the upload; the folder is complete and nothing was committed"
            hint = f"use a token that may write to {repo} (`hf auth login`, or HF_TOKEN), then: "
            hint += upload_command(folder, repo, private=private)
        raise InputError(problem, found=_one_line(error), where=folder, hint=hint) from error
    raise InputError(
        "the repository exists and is public; the folder is complete and nothing was committed",
        expected="a private repository",
        found=repo,
        where=folder,
        hint=f"make it private in its settings, or choose a new name; then: {upload_command(folder, repo)}",
    )


def _is_loaded(name: str) -> bool:
    """Whether a file of a repository is one of those that a model is loaded from."""
    is_tokenizer = name in TOKENIZER_FILES or name.startswith(f"{CHAT_TEMPLATES}/")
    return bool(_WEIGHTS.fullmatch(name)) or name in _ALSO_LOADED or is_tokenizer


def _huggingface_hub() -> ModuleType:
    try:
        import huggingface_hub
        from huggingface_hub import constants  # noqa: F401 (huggingface_hub.constants exists once it is imported)
    except ModuleNotFoundError as error:
        otherwise = "or leave out the repository: the folder is written without this package"
        raise missing_package(error, "hf", otherwise=otherwise) from error
    return huggingface_hub


def _status(error: Exception) -> int | None:
    """The HTTP status that an error of the client, or its cause, reports."""
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return _status(error.__cause__) if status is None and isinstance(error.__cause__, Exception) else status


def _one_line(error: Exception) -> str:
    """Types and messages of an error and its cause."""
    words = " ".join(str(error).split())[:300]
    line = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return f"{line} {_one_line(error.__cause__)}" if isinstance(error.__cause__, Exception) else line
