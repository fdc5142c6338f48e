"""What a run says of itself: lines for machines and for people."""

from __future__ import annotations

from pipelines.training.run_log import RunLog, read_metrics, readable


def figures(loss: float) -> dict[str, float]:
    return {
        "loss": loss,
        "lr": 1e-3,
        "epoch": 0.5,
        "grad_norm": 1.0,
        "samples_per_s": 10.0,
        "tokens_per_s": 900.0,
        "data_wait_share": 0.012,
        "memory_gib": 2.0,
        "seconds_left": 3700.0,
    }


def test_a_resumed_run_writes_over_what_it_does_again(tmp_path, capsys):
    run = str(tmp_path / "run")
    log = RunLog(run, num_steps=4, start_step=0)
    for step in (1, 2, 3):
        log.write(step, figures(float(step)))
    log.close()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # the process was killed here
    log = RunLog(run, num_steps=4, start_step=2)
    log.write(3, figures(30.0))
    log.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(run)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert "step 3/4 | epoch 0.50 | loss 30.0000 | lr 1.00e-03" in capsys.readouterr().out
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_the_line_is_readable():
    assert readable(5, 10, figures(0.25)) == (
        "step 5/10 | epoch 0.50 | loss 0.2500 | lr 1.00e-03 | grad 1.00 | 10.0 samples/s | 900 tokens/s | "
        "data wait 1.2% | 2.0 GiB | 1:01:40 left"
    )
