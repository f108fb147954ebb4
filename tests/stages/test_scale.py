"""Eight times the data in the memory of once: nothing gathers in the driver, nothing stays in a worker."""

import pytest

from jobs.benches.memory import barycenter_peaks, features_peaks, relabel_peaks
from jobs.benches.processes import Peaks

# What metadata, fragmentation and other work of the same process may add, MiB; each large case holds more data than this.
DRIVER_MIB = 32
WORKER_MIB = 80


def assert_flat(once: Peaks, eight: Peaks, data_mib: float) -> None:
    assert data_mib > WORKER_MIB
    # The first run's imports are in the first peak; the second may only add to what is there.
    assert eight.driver_grew < DRIVER_MIB, (once, eight)
    assert eight.worker <= 1.2 * once.worker and eight.worker < once.worker + WORKER_MIB


@pytest.mark.slow
def test_features_of_eight_times_the_images_in_more_and_larger_shards_take_no_more_memory(
    ray_local: None,
) -> None:
    once, eight = features_peaks(300, 4), features_peaks(1200, 8)
    assert_flat(once, eight, 8 * 1200 * 64 * 64 * 3 / 2**20)


@pytest.mark.slow
def test_barycenters_of_eight_times_the_classes_take_no_more_memory(ray_local: None) -> None:
    once, eight = barycenter_peaks(1000, 12), barycenter_peaks(1000, 96)
    assert_flat(once, eight, 96 / 2 * 1000 * 512 * 4 / 2**20)  # two actors share the classes


def test_labels_of_eight_times_the_epochs_do_not_gather() -> None:
    once, eight = relabel_peaks(10), relabel_peaks(80)
    logits_mib = 80 * 600 * 600 * 4 / 2**20
    assert logits_mib > 3 * DRIVER_MIB
    assert eight.driver_grew < DRIVER_MIB, (once, eight)
