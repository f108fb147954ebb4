"""Eight times the data in the memory of once: nothing gathers in the driver, nothing stays in a worker."""

import pytest

from tests.stages.memory import barycenter_peaks, features_peaks, relabel_peaks
from tests.stages.processes import Peaks

# What metadata, fragmentation and other work of the same process may add, MiB; each large case holds twice as much data.
# A worker of the session's Ray gives back what it frees, so its peaks differ by 5 MiB from run to run.
DRIVER_MIB = 32
WORKER_MIB = 32


def assert_flat(once: Peaks, eight: Peaks, data_mib: float) -> None:
    """Assert that eight times as much data, `data_mib` of them in a worker if it kept them, needs no more memory."""
    assert data_mib * 7 / 8 > 1.8 * WORKER_MIB
    # The first run's imports are in the first peak; the second may only add to what is there.
    assert eight.driver_grew < DRIVER_MIB, (once, eight)
    assert once.worker > 100, "no worker was seen"
    assert eight.worker < once.worker + WORKER_MIB, (once, eight)


@pytest.mark.slow
def test_features_of_eight_times_the_images_in_more_and_larger_shards_take_no_more_memory(
    ray_local: None,
) -> None:
    once, eight = features_peaks(200, 4), features_peaks(800, 8)
    assert_flat(once, eight, 8 * 800 * 64 * 64 * 3 / 2**20)


@pytest.mark.slow
def test_barycenters_of_eight_times_the_classes_take_no_more_memory(ray_local: None) -> None:
    once, eight = barycenter_peaks(1000, 9), barycenter_peaks(1000, 72)
    assert_flat(once, eight, 72 / 2 * 1000 * 512 * 4 / 2**20)  # two actors share the classes


def test_labels_of_eight_times_the_epochs_do_not_gather() -> None:
    once, eight = (relabel_peaks(epochs, epochs_per_unit=5) for epochs in (10, 80))
    epoch_mib = 600 * 600 * 4 / 2**20
    # A unit's logits are there twice, as arrays and as the file of them.
    assert 2 * 5 * epoch_mib < DRIVER_MIB / 2 and 80 * epoch_mib > 3 * DRIVER_MIB
    assert eight.driver_grew < DRIVER_MIB, (once, eight)
