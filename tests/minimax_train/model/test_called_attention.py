"""Memory where the host calls the attention between CUDA graphs."""

from minimax_train.model.memory import RECOMPUTATIONS, ActivationMemory, choose_recomputation
from support.runs import model_config


def test_what_a_called_attention_reads_is_kept():
    model = model_config()  # LLSL
    plain, called = (ActivationMemory(model, attention_is_called=each) for each in (False, True))
    none, selective, full = ((kind,) * 4 for kind in RECOMPUTATIONS)
    cheap = 3 * 700 * 2 * model.attentions[0].activations(model).cheap
    assert called.kept(700, selective) - plain.kept(700, selective) == cheap
    # With one layer that is full there are no graphs.
    for kinds in (none, full, ("full", "selective", "selective", "none")):
        assert called.kept(700, kinds) == plain.kept(700, kinds)
        assert called.peak(700, kinds) == plain.peak(700, kinds)


def test_no_more_layers_are_computed_again_than_must():
    """What fits without graphs fits, and every choice fits that can."""
    plain, called = (ActivationMemory(model_config(), attention_is_called=each) for each in (False, True))
    most = called.peak(1000, ("none",) * 4)
    for free in range(0, int(1.1 * most), most // 300):
        kinds, without = (choose_recomputation(memory, 1000, free) for memory in (called, plain))
        assert kinds == ("full",) * 4 or called.peak(1000, kinds) <= 0.94 * free
        if "full" in without:
            assert kinds == without
