"""What `import wmdd_ray` offers: the commands as functions, and the distilled set.

The options are those of the commands (`wmdd-ray distill --help-all`), with underscores: `distill(ipc=1, dry_run=True)`, and
for those with a dot `distill(**{"recover.iterations": 100})`. A tuple is several values, None an absent option. The functions
print what the commands print, and raise the errors of `wmdd_ray.errors` where these end with an exit code.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wmdd_ray.errors import ConfigError
from wmdd_ray.store.documents import read_sealed
from wmdd_ray.store.filesystem import Store

if TYPE_CHECKING:
    from wmdd_ray.dataset import DistilledDataset

# Inside the package where it is installed, beside it in a checkout.
JOBS = "wmdd_ray.jobs" if importlib.util.find_spec("wmdd_ray.jobs") else "jobs"


@dataclass(frozen=True)
class Run:
    """A run at rest."""

    uri: str
    """Its root, as a path or URI."""

    @property
    def dataset_uri(self) -> str:
        """Where its distilled set lies."""
        return f"{self.uri}/dataset"

    def dataset(self, **options: Any) -> DistilledDataset:
        """Open its distilled set, with the options of `load_dataset`."""
        return load_dataset(self.dataset_uri, **options)

    def results(self) -> list[dict[str, Any]]:
        """Return the rows of its accuracy table.

        A row has, beside others: `row` (`distilled`, `random_real`, ...), `labels` (`soft` or `hard`), `top1` (a fraction for
        each seed), `top1_mean` and `top1_std`.

        Raises:
            ArtifactError: The run was not evaluated.
        """
        from wmdd_ray.spine.rooms import Room

        table: list[dict[str, Any]] = (
            Room(Store(self.uri), "evaluation").committed().metrics["table"]
        )
        return table


def distill(**options: Any) -> Run:
    """Distill a labelled image data set, or go on where an interrupted run has stopped.

    Args:
        **options: of `wmdd-ray distill`, above all `recipe` ("digits"), `ipc` (10, images a class), `data`, `out`.

    Returns:
        The run; `run.dataset()` holds ipc images of each of Y classes, as a training loop takes them. Of several ipc, the folder of
        their runs: `Run(f"{run.uri}/ipc10")`.

    Raises:
        WmddError: A subclass says what is wrong.
    """
    command = _command("distill")
    jobs = _parsed(command.parse_all, _words(options))
    command.distill(jobs)
    return Run(Store(command.root_of(jobs[0])).uri)


def prepare(source: str, **options: Any) -> str:
    """Turn labelled images into class-contiguous Parquet shards with a held-out split, and return where they are.

    Args:
        source: real images: a folder, a file, a pattern or a URI.
        **options: of `wmdd-ray prepare`; `out` is needed.

    Returns:
        A URI for `distill(data=...)`.

    Raises:
        WmddError: A subclass says what is wrong.
    """
    command = _command("prepare")
    parsed = _parsed(
        lambda words: command.command_line.parse(command.Job, words, description=None),
        [source, *_words(options)],
    )
    command.prepare(parsed)
    return Store(parsed.out).uri


def evaluate(uri: str, **options: Any) -> dict[str, Any]:
    """Train students on a distilled set alone and test them on held-out real images.

    Args:
        uri: a set of ours, its run, or labelled images that somebody else distilled.
        **options: of `wmdd-ray evaluate`, as `students=("resnet18",)`, `seeds=3`, `labels=("soft", "hard")`.

    Returns:
        What results.json holds; its `table` has a row for each student, training set and kind of labels, as `Run.results`.

    Raises:
        WmddError: A subclass says what is wrong.
    """
    command = _command("evaluate")
    parsed = _parsed(lambda words: command.parse(words, None), [uri, *_words(options)])
    command.evaluate(parsed)
    return read_sealed(Store(parsed.out), "results.json")


def load_dataset(uri: str, **options: Any) -> DistilledDataset:
    """Open a distilled set.

    Args:
        uri: its `dataset/` folder: a local path, `s3://`, or any URI that fsspec knows.
        **options: `epochs`, `cache_gib`, `teacher_device`, as `DistilledDataset` has them.

    Returns:
        A torch data set of N images and E passes over them. An item is (view float32 (C, S, S), normalized; teacher's logits
        float32 (Y,); weight float32 ()).

    Raises:
        ArtifactError: There is no data set, or it is incomplete or changed.
    """
    from wmdd_ray.dataset import DistilledDataset

    return DistilledDataset(uri, **options)


def job(name: str) -> Any:
    """Return the module of a command."""
    return importlib.import_module(f"{JOBS}.{name}")


def lacking(error: ModuleNotFoundError) -> ConfigError:
    """Return what to say of a command that imports something that is not installed."""
    return ConfigError(f"{error}; for the commands: pip install 'wmdd_ray[distill]'")


def _command(name: str) -> Any:
    try:
        return job(name)
    except ModuleNotFoundError as error:
        raise lacking(error) from error


def _words(options: dict[str, Any]) -> list[str]:
    """Return options as a command line has them."""
    words = []
    for name, value in options.items():
        group, dot, last = name.replace("_", "-").rpartition(".")
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{group}{dot}{'' if value else 'no-'}{last}")
        else:
            values = value if isinstance(value, tuple | list) else [value]
            words += [f"--{group}{dot}{last}", *map(str, values)]
    return words


def _parsed(parse: Any, words: list[str]) -> Any:
    """Return the parsed job; what the parser says of a value that does not parse stands on standard error."""
    try:
        return parse(words)
    except SystemExit as ended:
        raise ConfigError(f"expected options of the command, got {' '.join(words)}") from ended
