import pytest
import torch

from headwater.models.gpt import GPT


def model(**options):
    return GPT(11, context=8, n_layers=2, dim=8, n_heads=2, **options).double()


def test_later_tokens_do_not_act_on_earlier_ones():
    tokens = torch.randint(11, (2, 8))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    a, b = model()(tokens), model()(changed)
    torch.testing.assert_close(a[:, :5], b[:, :5], rtol=0, atol=1e-15)
    assert (a[:, 5:] - b[:, 5:]).abs().max() > 1e-4


def test_padding_on_either_side_changes_nothing():
    tokens, net = torch.randint(11, (1, 5)), model()
    plain = net(tokens)
    pad = torch.full((1, 2), 3)
    ones, zeros = torch.ones(1, 5).long(), torch.zeros(1, 2).long()
    right = net(torch.cat([tokens, pad], 1), torch.cat([ones, zeros], 1))[:, :5]
    left = net(torch.cat([pad, tokens], 1), torch.cat([zeros, ones], 1))[:, 2:]
    beyond = net(torch.cat([tokens, *2 * [pad]], 1), torch.cat([ones, *2 * [zeros]], 1))[:, :5]
    torch.testing.assert_close(beyond, plain, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(right, plain, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(left, plain, rtol=1e-12, atol=1e-14)


def test_attention_is_that_of_torch():
    layer = model().blocks[0].attention
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    heads = [p(x).view(2, 6, 2, 4).transpose(1, 2) for p in (layer.query, layer.key, layer.value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
    seen = torch.ones(6, 6).bool().tril()
    torch.testing.assert_close(layer(x, seen), layer.out(expected.transpose(1, 2).flatten(2)))


def test_a_tied_head_reads_the_embedding():
    net = model()
    assert net.head.weight is net.embed.weight
    assert "head.weight" not in dict(net.named_parameters())
    assert model(tied=False).head.weight is not model(tied=False).embed.weight


def test_the_default_has_four_blocks_of_width_256():
    net = GPT(1000)
    blocks = 4 * (4 * (256 * 256 + 256) + 256 * 1024 + 1024 + 1024 * 256 + 256 + 4 * 256)
    assert sum(p.numel() for p in net.parameters()) == 1000 * 256 + 128 * 256 + blocks + 2 * 256


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="at most 8 tokens; got 9"):
        model()(torch.zeros(1, 9).long())
    with pytest.raises(ValueError, match="multiple of n_heads; got 8 and 3"):
        GPT(5, dim=8, n_heads=3)
