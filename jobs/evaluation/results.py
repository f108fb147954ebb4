"""What jobs/evaluate.py found: stored as one sealed document, and printed."""

from __future__ import annotations

from typing import Any

from wmdd_ray.config import EvaluateConfig
from wmdd_ray.product.comparison import method_of
from wmdd_ray.product.tables import ROW_NAMES, results_table
from wmdd_ray.spine.rooms import StageCommit
from wmdd_ray.spine.run import Run
from wmdd_ray.store.documents import seal
from wmdd_ray.telling.progress import duration
from wmdd_ray.units.tensor_set import TensorSet

from ..checks.report import many
from .options import Evaluation

RESULTS_KEY = "results.json"


def write_results(
    run: Run,
    evaluation: Evaluation,
    commits: dict[str, StageCommit],
    table: list[dict[str, Any]],
    attacked: dict[str, Any] | None,
) -> None:
    """Store all results as one sealed document."""
    given, teacher = run.source("train"), commits.get("teacher")
    document = {
        "set": {
            "uri": evaluation.own.uri if evaluation.own is not None else evaluation.job.uri,
            "fingerprint": given.fingerprint(),
            "ours": evaluation.own is not None,
            "class_names": list(given.class_names),
            "stored": stored_of(evaluation, given),
        },
        "held_out": {
            "uri": evaluation.config.val_data or evaluation.config.data,
            "fingerprint": run.source("val").fingerprint(),
        },
        "teacher": teacher_told(evaluation, teacher),
        "seeds": list(range(evaluation.config.evaluate.num_seeds)),
        "students": {
            student: {
                name: commits[student].metrics[name]
                for name in ("student", "hardware", "versions", "git_revision")
            }
            | {"fingerprint": commits[student].fingerprint, "options": commits[student].options}
            for student in evaluation.students
        },
        "table": table,
    }
    if attacked is not None:
        document["attacks"] = attacked
    run.store.put(RESULTS_KEY, seal(document))


def stored_of(evaluation: Evaluation, given: Any) -> dict[str, Any]:
    """Return what a set keeps, and of ours what made it."""
    if evaluation.own is None:
        each, left = divmod(given.num_images or 1, len(given.class_names))
        return {"image_bytes": given.total_bytes, **({} if left else {"ipc": each})}
    meta = evaluation.own.meta
    about = {name: meta[name] for name in ("ipc", "image_bytes", "label_bytes")}
    return {**about, "recipe": meta["provenance"]["recipe"], "method": method_of(meta)}


def teacher_told(evaluation: Evaluation, teacher: StageCommit | None) -> dict[str, Any] | None:
    """Return whose soft labels they are, and its top-1 on held-out images; with `labelers_top1` the mean of several."""
    if evaluation.own is not None:
        meta = evaluation.own.meta
        return {
            "uri": evaluation.own.uri,
            "top1": meta["teacher_top1"],
            **_labelers(meta.get("teachers_top1")),
        }
    if teacher is None:
        return None
    return {
        "uri": evaluation.job.teacher,
        "top1": teacher.metrics["top1"],
        **_labelers(teacher.metrics.get("teachers_top1")),
        "sha256": teacher.file("teacher.safetensors").sha256,
    }


def _labelers(top1: list[float] | None) -> dict[str, Any]:
    return {} if top1 is None else {"labelers_top1": top1}


def print_summary(
    run: Run,
    evaluation: Evaluation,
    commits: dict[str, StageCommit],
    table: list[dict[str, Any]],
    attacked: dict[str, Any] | None,
    seconds: float,
) -> None:
    """Print what was tested, the table, and where it lies."""
    teacher = teacher_told(evaluation, commits.get("teacher"))
    recipe = evaluation.config.evaluate
    uri = evaluation.own.uri if evaluation.own is not None else evaluation.job.uri
    print()
    given = run.source("train")
    print(f"set             {uri}{f' ({given.told})' if isinstance(given, TensorSet) else ''}")
    if teacher is not None:
        several = teacher.get("labelers_top1")
        if several is None:
            print(f"teacher         top-1 {100 * teacher['top1']:.1f} % ({teacher['uri']})")
        else:
            each = ", ".join(f"{100 * top1:.1f}" for top1 in several)
            print(
                f"teachers        {len(several)}, top-1 {each} %, their mean labels ({teacher['uri']})"
            )
    print(
        f"students        from scratch, {optimizers(recipe)}, batches of {recipe.batch_size}; tested on "
        f"held-out images after the last epoch; mean ± standard deviation over {many(recipe.num_seeds, 'seed')}\n"
    )
    print(results_table(table, for_page=False))
    if attacked is not None:
        print_attacks(attacked)
    print(f"\nresults         {run.store.uri}/{RESULTS_KEY}")
    print(f"this run took   {duration(seconds)}")


def optimizers(recipe: EvaluateConfig) -> str:
    """Return the optimizer and its rate, by labels where they differ."""
    own = {labels: recipe.for_labels(labels) for labels in recipe.labels}
    texts = {labels: f"{one.optimizer} at {one.learning_rate:g}" for labels, one in own.items()}
    if len(set(texts.values())) == 1:
        return texts[recipe.labels[0]]
    return ", ".join(f"{text} for {labels} labels" for labels, text in texts.items())


def print_attacks(attacked: dict[str, Any]) -> None:
    """Print the accuracies under attack, and what in them cannot be."""
    from wmdd_ray.robustness.results import markdown

    print(
        f"\nunder attack    top-1 %, {attacked['images']} held-out images, as many of each class; eps is the largest change of a "
        "pixel in [0, 1];\n                worst case: an image counts where no attack up to eps but CW has made it fall\n"
    )
    print(markdown(attacked, ROW_NAMES))
    for item in attacked["contradictions"]:
        mark = "! " if item["suspect"] else "  "
        print(
            f"\n{mark}{item['what']} at eps {item['eps']} in {item['images']} images ({100 * item['share']:.1f} %) of "
            f"{item['student']}, {item['row']}, {item['labels']} labels, seed {item['seed']}",
            end="",
        )
    if attacked["contradictions"]:
        print(
            "\n\nAutoAttack, PGD and Square search at random, so single images contradict; more than 1 % (!) mean gradients that "
            "mislead them: believe the worst case"
        )
