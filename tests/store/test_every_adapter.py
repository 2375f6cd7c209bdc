"""What any adapter gives survives the store: found by discovery, on the adapter's own sample."""

import numpy as np
import pytest

from sensors.adapters.base import adapters, open_source
from sensors.records import Log
from sensors.store.codec import MAX_ERROR_M
from sensors.store.reader import open_store
from sensors.store.writer import Reference, write_log


@pytest.mark.parametrize("name", adapters())
@pytest.mark.parametrize("reference", [False, True])
def test_a_sample_comes_back_item_by_item(name, reference, tmp_path):
    (tmp_path / "raw").mkdir()
    source = adapters()[name].write_sample(tmp_path / "raw")
    logs = [entry for entry in open_source(source, name) if isinstance(entry, Log)]
    assert logs
    for log in logs:
        manifest = write_log(tmp_path / "s", log, reference=Reference(source, name) if reference else None)
        found = open_store(tmp_path / "s").open_log(log.id)
        gone = {(row["sensor"], row["stamp_ns"]) for row in manifest["quarantined"]}
        for sensor, stamps in [*log.sweep_stamps_ns.items(), *log.image_stamps_ns.items()]:
            kept = [i for i, stamp in enumerate(stamps.tolist()) if (sensor, stamp) not in gone]
            for place, i in enumerate(kept):
                if sensor in log.cameras:
                    meant, got = log.read_image(sensor, i), found.read_image(sensor, place)
                    assert got.encoded == meant.encoded and got.exposure_ns == meant.exposure_ns
                    continue
                meant, got = log.read_sweep(sensor, i), found.read_sweep(sensor, place)
                assert (
                    np.abs(got.points.astype(float) - meant.points).max(initial=0) <= MAX_ERROR_M
                    and np.abs(got.intensity - meant.intensity).max() < 1e-5
                )
                for field in ("ring", "time_ns"):
                    ours, theirs = getattr(got, field), getattr(meant, field)
                    assert (ours is None) == (theirs is None) and (ours is None or (ours == theirs).all())
        labels, meant_labels = found.open_labels(), log.open_labels()
        assert (labels is None) == (meant_labels is None)
        if labels is not None:
            assert sorted(box.track for box in labels.boxes) == sorted(box.track for box in meant_labels.boxes)
    assert open_store(tmp_path / "s").verify() == []
