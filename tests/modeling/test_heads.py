# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import numpy as np
import pytest
import torch
from torch import nn

from avdet2.modeling.heads import HeadSettings, MLPHead, global_pool, joint_cluster


def _head(
    out_channels: int, in_channels: int = 12, hidden_dim: int = 16, dropout: float = 0.0
) -> MLPHead:
    return MLPHead(in_channels, HeadSettings(hidden_dim, 7, 9, "BN", dropout), out_channels)


def _num_parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def _randomize_norm(head: MLPHead) -> None:
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)


def _linear_twin(head: MLPHead) -> nn.Sequential:
    """
    The same network on vectors, of torch's own layers.
    """
    hidden, out = [m for m in head if isinstance(m, nn.Conv2d)]
    first = nn.Linear(hidden.in_channels, hidden.out_channels, bias=False)
    norm = nn.BatchNorm1d(hidden.out_channels)
    last = nn.Linear(out.in_channels, out.out_channels)
    first.weight.data = hidden.weight.data.flatten(1).clone()
    norm.load_state_dict(hidden.norm.state_dict())
    last.weight.data, last.bias.data = out.weight.data.flatten(1).clone(), out.bias.data.clone()
    return nn.Sequential(first, norm, nn.ReLU(), last)


@pytest.mark.parametrize(
    ("out_channels", "count"), [(128, 328_832), (39, 283_175), (30, 278_558), (300, 417_068)]
)
def test_number_of_parameters(out_channels, count):
    assert _num_parameters(_head(out_channels, 512, 512)) == count


@pytest.mark.parametrize("training", [True, False])
def test_a_head_on_pooled_vectors_is_a_linear_mlp(training):
    torch.manual_seed(0)
    head = _head(5)
    _randomize_norm(head)
    twin = _linear_twin(head)
    head.train(training)
    twin.train(training)
    x = torch.randn(8, 12, 4, 6)
    expected = twin(x.mean(dim=(2, 3)))
    assert expected.std() > 0.1
    torch.testing.assert_close(head(global_pool(x)).flatten(1), expected)


def test_a_head_on_a_map_treats_every_location_alike():
    torch.manual_seed(0)
    head = _head(5).eval()
    _randomize_norm(head)
    twin = _linear_twin(head).eval()
    x = torch.randn(2, 12, 3, 4)
    output = head(x)
    assert output.shape == (2, 5, 3, 4)
    for row in range(3):
        for column in range(4):
            torch.testing.assert_close(output[:, :, row, column], twin(x[:, :, row, column]))


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    plain, dropped = _head(5), _head(5, dropout=0.3)
    assert [type(m) for m in dropped].count(nn.Dropout) == 2
    # Dropout stands in front of both layers, so names differ and the order of tensors does not.
    state = dict(zip(dropped.state_dict(), plain.state_dict().values()))
    dropped.load_state_dict(state)
    x = torch.randn(6, 12, 1, 1)
    assert not torch.equal(dropped.train()(x), dropped(x))
    # The running statistics moved: copy the weights again before the comparison.
    dropped.load_state_dict(state)
    torch.testing.assert_close(dropped.eval()(x), plain.eval()(x))


def test_global_pool_is_the_mean_over_space():
    x = torch.arange(24.0).view(1, 2, 3, 4)
    assert global_pool(x).tolist() == [[[[5.5]], [[17.5]]]]


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_the_joint_cluster_is_that_of_the_sum(kind):
    # Alone, the first frame would choose 0 and its sound 2; the last row is a tie of 1 and 2.
    logits_v, logits_a = (
        kind([[3.0, 2, 0], [0, 1, 5], [0, 2, 1]]),
        kind([[0.0, 2, 3], [9, 1, 1], [0, 0, 1]]),
    )
    assert joint_cluster(logits_v, logits_a).tolist() == [1, 0, 1]
    assert int(joint_cluster(logits_v[0], logits_a[0])) == 1


def test_a_head_can_be_scripted():
    torch.manual_seed(0)
    head = _head(5, dropout=0.3).eval()
    _randomize_norm(head)
    features = torch.randn(2, 12, 3, 4)
    assert torch.equal(torch.jit.script(head)(features), head(features))
