"""--compile: each network becomes one graph, in sampling and in training, and stays it as long as shapes do.

The backend counts the graphs and runs them as they are. ``fullgraph`` makes a break in a graph an error.
"""

import pytest
import torch
from made_runs import samples, settings, small_model
from peers import relative_error

from minildm.adapters import METHODS, selora
from minildm.training.finetune import Finetuning
from minildm.training.loop import train_step
from minildm.training.machine import checkpoint_blocks
from minildm.training.state import State


@pytest.fixture
def graphs():
    """What has been compiled, a list that grows."""
    torch.compiler.reset()
    yield []
    torch.compiler.reset()


def counting(graphs):
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return {"backend": backend, "fullgraph": True}


def test_sampling_compiles_three_networks_to_one_graph_each(graphs):
    model = small_model()
    options = {"steps": 20, "sampler": "dpm++", "output": "tensor", "init_images": torch.zeros(1, 3, 64, 64)}
    options["strength"] = 0.15  # three steps
    before = model.sample(["a"], **options)
    model.compile_networks(**counting(graphs))
    assert relative_error(model.sample(["a"], **options), before) <= 1e-5
    assert len(graphs) == 3
    model.sample(["b"], **options | {"seed": 1, "sampler": "ddim"})
    assert len(graphs) == 3


def compiled_run(graphs, adapter, checkpointing=False, **changes):
    """(take a step, the method, the State) of a small model whose networks are compiled as `finetune` does it."""
    model = small_model()
    method_settings, config = settings(adapter, **changes)
    task = Finetuning(model, samples(), samples(0), config)
    method = METHODS[adapter](model, method_settings, 10, seed=0)
    if checkpointing:
        checkpoint_blocks(model.unet, model.text_encoder)
    method.compiled = True
    model.unet.compile(**counting(graphs))
    model.text_encoder.compile(**counting(graphs))
    state = State(method, config)

    def step():
        batch = next(iter(task.batches(state.step, state.step + 1)))
        entry = train_step(state, method, task, config, batch, 1e-3)
        state.step += 1
        return entry

    return step, method, state


@pytest.mark.parametrize(
    "adapter, changes",
    [
        ("lora", {"min_snr_gamma": 5.0}),
        pytest.param(
            "adalora", {"prune_interval": 1, "initial_share": 0.1, "final_share": 0.8}, marks=pytest.mark.slow
        ),
        pytest.param("full", {}, marks=pytest.mark.slow),
        pytest.param("lora", {"checkpointing": True, "micro_batch": 2}, marks=pytest.mark.slow),
        pytest.param("dylora", {"max_rank": 1, "update_rule": "single"}, marks=pytest.mark.slow),
    ],
)
def test_training_compiles_one_graph_for_each_network(graphs, adapter, changes):
    step, _, _ = compiled_run(graphs, adapter, **changes)
    entries = [step() for _ in range(3)]
    assert len(graphs) == 2
    assert all("skipped" not in entry for entry in entries) and entries[0]["grad_norm"] > 0


@pytest.mark.slow
def test_dylora_compiles_once_for_each_rank(graphs):
    step, _, _ = compiled_run(graphs, "dylora", max_rank=3)
    ranks = {step()["active_rank"] for _ in range(8)}
    assert len(graphs) == 2 * len(ranks) == 6


@pytest.mark.slow
def test_growth_compiles_a_network_again_once_per_8_ranks_whichever_layers_grow(graphs, capsys, monkeypatch):
    """Layers pass rank 8 one after the other. A step with a test runs as written, the one after it is compiled."""
    step, method, state = compiled_run(graphs, "selora", rank=7, expand_interval=2)
    first, second, *_, text = method.layers  # two of the U-Net, the last one of the text encoder
    assert [path.split(".")[0] for path in (first, second, text)] == ["unet", "unet", "text_encoder"]
    step()
    compiled = [len(graphs)]
    for grown in ([first, second], [first], [second, first], [text], [text], [second, text]):
        monkeypatch.setattr(selora, "layers_to_grow", lambda *_, grown=grown: grown)
        assert step()["grown"] == len(grown)
        told = "compiled again" in capsys.readouterr().out
        step()
        compiled.append(len(graphs))
        assert told == (compiled[-1] > compiled[-2])
    assert compiled == [2, 2, 3, 3, 3, 4, 4]
    assert set(state.trained) == set(method.trained())
    ages = {name: age for name, age in zip(state.trained, state.optimizer.ages)}
    assert ages[f"{second}.lora_A.1"][1].tolist() == [7, 1] + [9] * 6  # rows count the steps since they are in use
