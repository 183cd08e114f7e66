"""An embedding in the host's memory gives the same rows and counts as before."""

import pytest
import torch
import transformers
from torch.multiprocessing.reductions import StorageWeakRef

from fitune.config import build
from fitune.methods import METHODS
from fitune.model.host_embedding import HostEmbedding, host_embedding
from fitune.model.load import Base, count_parameters


def tiny(tied):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).requires_grad_(False)


def test_the_model_is_the_same_with_it():
    model, ids = tiny(False), torch.arange(12).view(2, 6)
    before, counted = model(ids).logits, count_parameters(model)
    weight = host_embedding(model)
    assert weight is model.get_input_embeddings().weight
    assert torch.equal(model(ids).logits, before)
    assert count_parameters(model) == counted
    assert host_embedding(model) is weight, "a second path over the same model"


def test_it_stays_where_it_is():
    hosted = HostEmbedding(tiny(False).get_input_embeddings())
    before = hosted.weight
    assert hosted.to("meta").weight is before
    assert not list(hosted.parameters())


@pytest.mark.parametrize(
    "method",
    [{"name": "lora"}, {"name": "ptuning"}, {"name": "prompt", "init": "random"}, {"name": "prefix", "init": "random"}],
)
def test_nothing_keeps_what_it_replaces(method):
    """PEFT's models with virtual tokens hold the embedding themselves."""
    model = tiny(False)
    before = StorageWeakRef(model.get_input_embeddings().weight.untyped_storage())
    config = build({"model": {"path": "x"}, "method": method})
    wrapped = METHODS[config.method.name].apply(Base(model, None, "llama", 64, ""), config.method)
    assert not before.expired()
    weight = host_embedding(model, wrapped)
    assert before.expired()
    assert all(m.weight is weight for m in wrapped.modules() if isinstance(m, HostEmbedding))


@pytest.mark.parametrize("why", ["tied", "trained"])
def test_an_embedding_that_is_needed_on_the_device_stays(why):
    model = tiny(why == "tied")
    model.get_input_embeddings().weight.requires_grad_(why == "trained")
    assert host_embedding(model) is None
    assert not isinstance(model.get_input_embeddings(), HostEmbedding)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    model, ids = tiny(False).cuda(), torch.arange(12, device="cuda").view(2, 6)
    before, taken = model(ids).logits, torch.cuda.memory_allocated()
    weight = host_embedding(model)
    assert weight.is_pinned()
    assert torch.cuda.memory_allocated() <= taken - 64 * 32 * 4
    assert torch.equal(model(ids).logits, before)
    model.to("cuda")
    assert next(model.parameters()).is_cuda
