"""Sending an export to the Hugging Face hub: only when asked, and checked before anything is computed."""

from pathlib import Path

import huggingface_hub

from latentvae.base.errors import LatentVAEError
from latentvae.models.card import HUB_ID, PLACE, Provenance, is_hub_id

CARD = "README.md"


def check_publishable(repository: str, provenance: Provenance) -> None:
    """Refuse what the hub would refuse after the upload.

    Raises:
        LatentVAEError: no hub id, or a base model that is none.
    """
    if not HUB_ID.fullmatch(repository):
        raise LatentVAEError(f"{repository!r} is no hub id; wanted OWNER/NAME, such as 'me/my-vae'.")
    base = provenance.base_model
    if base and not is_hub_id(base):
        raise LatentVAEError(
            f"the base model {base!r} is no hub id, which a card on the hub needs. Name it: "
            "--base-model OWNER/NAME."
        )


def publish(folder: Path, repository: str, *, subfolder: str = "", private: bool = False) -> str:
    """Upload an export to a hub repository, made if it is not there, and its card to the top of that.

    Args:
        folder: an export.
        repository: OWNER/NAME, of the account whose token `hf auth login` has stored.
        subfolder: where in the repository the model goes; "vae" for that of a pipeline.
        private: whether a repository that is made here is private.

    Returns:
        The repository's address.

    Raises:
        LatentVAEError: the hub refuses or cannot be reached. The export stays as it is.
    """
    # the card's example says how to load from where it is now, which only the upload knows
    place = repr(repository) + (f", subfolder={subfolder!r}" if subfolder else "")
    card = (folder / CARD).read_text(encoding="utf-8").replace(PLACE, place.replace("'", '"'))
    try:
        hub = huggingface_hub.HfApi()
        url = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repository, folder_path=folder, path_in_repo=subfolder or None, ignore_patterns=[CARD]
        )
        # the card goes last, and to the top: the hub shows only a README.md there
        hub.upload_file(repo_id=repository, path_or_fileobj=card.encode(), path_in_repo=CARD)
    except Exception as error:  # what is raised without a connection depends on the hub's HTTP library
        raise LatentVAEError(
            f"{folder} is exported, but the hub did not take it as {repository} "
            f"({type(error).__name__}: {error}). Log in with `hf auth login`, check the name and the "
            "connection, and export again with --overwrite."
        ) from error
    return str(url)
