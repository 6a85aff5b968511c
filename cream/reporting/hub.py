"""Uploading a checkpoint with its model card to the Hugging Face hub: which files, and how."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

import msgspec

from cream.errors import UserError
from cream.files import store
from cream.files.fingerprints import TEMPLATES
from cream.files.folders import INDEX, weight_files
from cream.files.provenance import KIND, read_kind

TOKENIZER = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt")
SETTINGS = ("config.json", "generation_config.json", INDEX, "chat_template.jinja", *TOKENIZER, "*.model", "*.tiktoken")
PLACES = ("started_from", "sources")  # of cream.json: paths of this machine
LOGIN = "log in with a token that may write (hf auth login), or set HF_TOKEN"

Content = Path | bytes


def files_to_upload(folder: Path, card: str, name: str) -> dict[str, Content]:
    """Name on the hub -> file or content: the model's weights, settings, tokenizer and templates, its own code where
    config.json names some, cream.json without paths, and the card, called `name`. Nothing else is ever uploaded: no
    state of the optimizer, log or data."""
    wanted = [*SETTINGS, *(["*.py"] if "auto_map" in store.read_json(folder / "config.json") else [])]
    weights = {path.name for path in weight_files(folder)}
    files: dict[str, Content] = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and (path.name in weights or any(fnmatch(path.name, pattern) for pattern in wanted))
    }
    files |= {f"{TEMPLATES}/{path.name}": path for path in sorted((folder / TEMPLATES).glob("*.jinja"))}
    if about := read_kind(folder):
        about = {key: value for key, value in about.items() if key not in PLACES}
        files[KIND] = msgspec.json.format(msgspec.json.encode(about), indent=2)
    return files | {name: card.encode()}


def describe_files(files: Mapping[str, Content]) -> list[str]:
    """A line for each file, with its size."""
    sizes = {name: len(each) if isinstance(each, bytes) else each.stat().st_size for name, each in files.items()}
    return [f"  {name}  {_size(size)}" for name, size in sizes.items()]


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def check_repo(repo: str) -> None:
    """Raises UserError unless `repo` can be a repository's name: owner/name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub {repo}: {error}") from None
    if "/" not in repo:
        raise UserError(f"--push_to_hub {repo}: expected owner/name")


def upload(repo: str, files: Mapping[str, Content], *, private: bool, message: str, api=None) -> str:
    """Upload files in one commit, and return its URL; a repository that does not exist is made. `api`: an HfApi.

    Raises UserError where a private repository is asked for and it exists as a public one, and where the hub cannot be
    reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, errors

    api = api or HfApi()
    operations: Sequence = [
        CommitOperationAdd(name, str(each) if isinstance(each, Path) else each) for name, each in files.items()
    ]
    try:
        try:
            found = api.repo_info(repo)
        except errors.RepositoryNotFoundError:
            api.create_repo(repo, private=private)
        else:
            if private and not found.private:
                raise UserError(f"--push_to_hub {repo}: exists, and is public; --private no uploads there all the same")
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)
    except (errors.HTTPError, OSError, ValueError) as error:
        raise UserError(f"--push_to_hub {repo}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Why the hub did not take it, and what to do."""
    from huggingface_hub import errors

    text = (str(error).strip() or type(error).__name__).partition("\n")[0]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.LocalTokenNotFoundError) or status in (401, 403):
        return f"the hub refuses ({text}); {LOGIN}"
    if isinstance(error, errors.HfHubHTTPError | ValueError):
        return f"the hub refuses ({text})"
    return f"the hub cannot be reached ({text}); unset HF_HUB_OFFLINE and check the network"
