"""Sweeps on a real Ray: the same table as on processes, and a worker that dies costs time only."""

import pytest
from test_sweep import FRAGILE, SMALL

from simrl.experiments.config import load_config
from simrl.experiments.sweep import design_sweep, run_sweep


def test_ray_gives_the_table_of_processes_though_a_worker_dies(tmp_path, monkeypatch):
    (tmp_path / "fragile_policy.py").write_text(FRAGILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of Ray's workers
    marker = tmp_path / "died"
    config = load_config(nodes=1, steps=2, sets=[*SMALL, f"policy.marker={marker}"], policy="fragile_policy:Fragile")
    design = design_sweep(config, {"policy.mode": ["works", "dies once", "raises"]}, seeds=2)
    on_ray = run_sweep(design, tmp_path / "ray", engine="ray")
    assert marker.exists(), "a worker has died"
    run_sweep(design, tmp_path / "local", jobs=1)
    assert len(on_ray.frame) == 4
    assert (tmp_path / "ray/results.parquet").read_bytes() == (tmp_path / "local/results.parquet").read_bytes()
    assert [failure["error"] for failure in on_ray.failures] == ["KeyError: 'a bug of its own'"] * 2


def test_a_cluster_that_is_not_there_is_told(tmp_path):
    from simrl.real_backend.ray_cluster import ClusterError

    design = design_sweep(load_config(nodes=1, steps=2, sets=SMALL), {"policy.dispatch": ["chunks"]})
    with pytest.raises(ClusterError, match="no Ray cluster answers"):
        run_sweep(design, tmp_path / "out", engine="ray", ray_address="127.0.0.1:9")
