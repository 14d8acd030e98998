import pytest

from simrl.traces.models import Model, load_model, model_names


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        # The model cards' numbers of parameters, in full where they give them.
        ("qwen2.5-0.5b", 0.494),
        ("qwen2.5-1.5b", 1.544),
        ("qwen2.5-3b", 3.086),
        ("qwen2.5-7b", 7.616),
        ("qwen2.5-14b", 14.770),
        ("llama-2-70b", 68.977),
        ("qwen2.5-32b", 32.764),
        ("qwen2.5-72b", 72.706),
        ("qwen2.5-math-7b", 7.616),
        ("qwen2-7b", 7.616),
        ("llama-3.1-8b", 8.030),
        ("qwen3-4b", 4.022),
        ("deepseek-llm-7b", 6.910),
        ("gemma-2-2b", 2.614),
    ],
)
def test_parameters_match_the_published_count(name, billions):
    assert load_model(name).parameters == pytest.approx(billions * 1e9, abs=0.0005 * 1e9)


def test_every_shipped_model_is_consistent_and_sourced():
    for name in model_names():
        model = load_model(name)
        assert model.name == name == name.lower()
        assert (model.heads * model.head_dim == model.hidden) is (name not in ("qwen3-4b", "gemma-2-2b"))
        assert model.heads % model.kv_heads == 0
        assert model.source


def tiny_model(**changes):
    facts = {
        "name": "tiny", "layers": 2, "hidden": 8, "heads": 2, "kv_heads": 1, "head_dim": 4, "intermediate": 16,
        "vocab": 10, "tied_embeddings": True, "qkv_bias": False, "max_context": 64, "source": "this test",
    }  # fmt: skip
    return Model(**{**facts, **changes})


def test_parameters_by_hand():
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8  # q, k and v, output
    layer = attention + 3 * 8 * 16 + 2 * 8
    assert tiny_model().parameters == 10 * 8 + 2 * layer + 8
    assert tiny_model(tied_embeddings=False).parameters == 2 * 10 * 8 + 2 * layer + 8
    assert tiny_model(qkv_bias=True).parameters == 10 * 8 + 2 * (layer + 8 + 2 * 4) + 8
    assert tiny_model(qk_norm=True).parameters == 10 * 8 + 2 * (layer + 2 * 4) + 8
    assert tiny_model(layer_norms=4).parameters == 10 * 8 + 2 * (layer + 2 * 8) + 8
    wide = 8 * (2 * 6) + 2 * 8 * 6 + (2 * 6) * 8  # heads of 6: queries of 12 beside a hidden width of 8
    assert tiny_model(head_dim=6).parameters == 10 * 8 + 2 * (wide + 3 * 8 * 16 + 2 * 8) + 8


def test_bytes_by_hand():
    model = tiny_model()
    assert model.weight_bytes() == model.parameters * 2
    assert model.weight_bytes(4) == model.parameters * 4
    assert model.kv_bytes_per_token() == 2 * 2 * (1 * 4) * 2  # keys and values, layers, width, bytes
    assert model.kv_bytes_per_token(1) == 2 * 2 * (1 * 4)


def test_a_name_is_found_in_any_case():
    assert load_model("Qwen2.5-7B") is load_model("qwen2.5-7b")


def test_an_unknown_name_gets_the_nearest_and_all_known():
    with pytest.raises(
        ValueError, match=r"model 'qwen2\.5-7' is unknown; did you mean 'qwen2\.5-7b'\? known: deepseek"
    ) as e:
        load_model("qwen2.5-7")
    for name in model_names():
        assert name in str(e.value)


def test_a_model_of_the_users_is_found_beside_the_shipped():
    assert load_model("Tiny", {"tiny": tiny_model()}) == tiny_model()
    with pytest.raises(ValueError, match="did you mean 'tiny'"):
        load_model("tinny", {"tiny": tiny_model()})


def test_a_name_like_none_gets_no_hint():
    with pytest.raises(ValueError, match="model 'zzz' is unknown; known: "):
        load_model("zzz")
