"""Upload a checkpoint with its card to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from slimvlm.core.errors import ConfigError, one_line
from slimvlm.models.files import check_folder
from slimvlm.models.load import resolve
from slimvlm.pruning.card import CARD_FILE

_HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
"""What the hub's HTTP client raises, whichever one this version of huggingface_hub uses."""


def push(folder: str | Path, repo_id: str, private: bool = False) -> str:
    """Upload a checkpoint folder, or the one in a run folder.

    The repository is made if it does not exist. The token is the one of ``hf auth login`` or of
    ``HF_TOKEN``.

    Args:
        folder: A checkpoint that slimvlm wrote, or a run folder.
        repo_id: ``owner/name``.
        private: Whether a new repository is private.

    Returns:
        Address of the commit.

    Raises:
        ConfigError: If the folder is no checkpoint with a card or has links that lead out of it,
            the name is not allowed, or the hub refuses.
    """
    path = Path(resolve(folder))
    check_folder(path)
    if not (path / CARD_FILE).is_file():
        raise ConfigError(f"push {str(path)!r}: there is no {CARD_FILE}; `slimvlm` writes one")
    try:
        api = HfApi()
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=path, commit_message="Upload a model made with slimvlm"
        )
    except (HFValidationError, _HTTP_ERROR, OSError) as error:
        raise ConfigError(f"push to repo_id {repo_id!r}: {one_line(error)}") from error
    return str(commit.commit_url)
