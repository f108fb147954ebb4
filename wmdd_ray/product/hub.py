"""An exported set as a repository of data sets on the Hugging Face hub."""

from __future__ import annotations

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from wmdd_ray.errors import ArtifactError, ConfigError, WmddError
from wmdd_ray.product.export import EXPORT_KEY, Export
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.uris import local_path

# The hub adds this one itself.
_ATTRIBUTES = ".gitattributes"
_NO_RIGHT = (401, 403)


def check_target(name: str, out: str) -> None:
    """Refuse what cannot be the name of a repository, and an export that lies elsewhere than on a disk.

    Raises:
        ConfigError: Either, with what is expected.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(
            f"--push-to-hub: expected NAME or USER/NAME, got {name!r}: {error}"
        ) from error
    if local_path(out) is None:
        raise ConfigError(
            f"--push-to-hub takes an export on a disk, got --out {out}; give a folder, which is kept as well"
        )


def files_of(done: Export) -> dict[str, int]:
    """Return the files of an export that are uploaded, with their sizes in bytes.

    Raises:
        ConfigError: Others lie among them, which would be published too.
    """
    there = dict(Store(done.uri).list())
    foreign = there.keys() - {entry.key for entry in done.files} - {EXPORT_KEY}
    if foreign:
        raise ConfigError(
            f"{done.uri}: expected the files of the export alone, found {len(foreign)} others that would be published, such as "
            f"{min(foreign)}; remove them"
        )
    return there


def address(name: str) -> str:
    """Return where a repository is, or will be."""
    return f"{constants.ENDPOINT}/datasets/{name}"


def push(done: Export, name: str, *, private: bool) -> str:
    """Upload an export, in one commit, and return the address of its repository.

    The token is that of HF_TOKEN or `hf auth login`; nothing shows it.

    Args:
        done: the export, on a disk.
        name: `NAME` of the token's account or `USER/NAME`; made where there is no such repository. One that holds other files
            than this export is refused: loaders would read both.
        private: whether the repository is for its owner alone.

    Raises:
        ConfigError: The repository is another one, public beside `private`, or not the token's to write.
        ArtifactError: The hub cannot be reached, or refuses.
    """
    files, hub = files_of(done), HfApi()
    try:
        made = hub.create_repo(name, repo_type="dataset", private=private or None, exist_ok=True)
        about = hub.dataset_info(made.repo_id)
        foreign = {file.rfilename for file in about.siblings or ()} - files.keys() - {_ATTRIBUTES}
        if foreign:
            raise ConfigError(
                f"{made.url}: expected a new repository or one with this export, found {len(foreign)} other files, such as "
                f"{min(foreign)}; give another name to --push-to-hub"
            )
        if private and not about.private:
            raise ConfigError(
                f"{made.url} is public already; make it private there, or leave --private out"
            )
        hub.upload_folder(
            repo_id=made.repo_id,
            repo_type="dataset",
            folder_path=done.uri,
            commit_message="Upload a distilled set",
        )
    except WmddError:
        raise
    except Exception as error:
        # The client raises what its HTTP library does, which is another one in each of its versions.
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, LocalTokenNotFoundError) or status in _NO_RIGHT:
            raise ConfigError(
                f"--push-to-hub {name}: expected a token that may write there, in HF_TOKEN or by `hf auth login` ({said})"
            ) from error
        raise ArtifactError(
            f"{address(name)} did not take the export: {said}; {done.uri} is whole, so run the same command again"
        ) from error
    return str(made.url)
