"""Several maps of one bag: what the authors' module computes in both forms, which tiles are masked, and what is alike."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from networks import mil_acmil
from networks.parts.bags import Bags

SEEN = dict(rtol=1e-4, atol=2e-5)
"""What the fixtures' own page asks of another implementation."""

NAMES = {
    "dimreduction.fc1": "project.0",
    "attention.attention_V.0": "maps.attention.v",
    "attention.attention_U.0": "maps.attention.u",
    "attention.attention_weights": "maps.attention.w",
    "Slide_classifier.fc": "head",
    "bag_attention.v_proj": "maps.bag.v",
    "bag_attention.out_proj": "maps.bag.out",
    "bag_attention.layer_norm": "maps.bag.norm",
}
OF_BRANCHES = {
    "q_proj": "maps.asking.{}.q",
    "k_proj": "maps.asking.{}.k",
    "v_proj": "maps.telling.{}.v",
    "out_proj": "maps.telling.{}.out",
    "layer_norm": "maps.telling.{}.norm",
}
"""The fixtures' names of layers, and ours."""


def our_name(theirs: str) -> str:
    layer, _, kind = theirs.rpartition(".")
    if theirs == "q":
        return "maps.query"
    if layer.startswith("sub_attention."):
        _, number, part = layer.split(".")
        return f"{OF_BRANCHES[part].format(number)}.{kind}"
    if layer.startswith("classifier."):
        return f"branch_heads.{layer.split('.')[1]}.{kind}"
    return f"{NAMES[layer]}.{kind}"


def filled(config: mil_acmil.Config, arrays: dict[str, torch.Tensor]) -> tuple[mil_acmil.Acmil, dict[str, str]]:
    """With the published weights; their names and ours. One branch has no head of its own."""
    classes = len(arrays["w/Slide_classifier.fc.bias"])
    network = mil_acmil.build(config, features=48, classes=classes).eval()
    theirs = [key[2:] for key in arrays if key.startswith("w/") and (config.branches > 1 or "/classifier." not in key)]
    ours = {name: our_name(name) for name in theirs}
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    network.load_state_dict({ours[name]: arrays[f"w/{name}"].view(shapes[ours[name]]) for name in theirs})
    return network, ours


def assert_losses(losses: dict[str, torch.Tensor], arrays: dict[str, torch.Tensor], phase: str) -> None:
    for name, theirs in dict(bag="loss_bag", branches="loss_branch", likeness="loss_div").items():
        found = losses.get(name, torch.tensor(0.0))  # one branch has the first alone
        torch.testing.assert_close(found, arrays[f"{phase}/{theirs}"], **SEEN)
    torch.testing.assert_close(sum(losses.values()), arrays[f"{phase}/loss_total"], **SEEN)


def assert_gradients(network: nn.Module, arrays: dict[str, torch.Tensor], ours: dict[str, str], phase: str) -> None:
    for key, expected in arrays.items():
        kind, _, theirs = key.partition("/")
        if kind != f"{phase}_grad":
            continue
        if theirs not in ours:
            assert not expected.any(), "a head that one branch leaves out learned nothing in theirs either"
            continue
        found = network.get_parameter(ours[theirs]).grad
        torch.testing.assert_close(found.view(expected.shape), expected, **SEEN)


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        ("ga_eval", "eval"),
        ("ga_one_branch", "eval"),
        ("ga_stkim", "eval"),
        ("ga_stkim", "train"),
        ("ga_stkim_drop0", "train"),
        ("ga_stkim_smallbag", "train"),
    ],
)
def test_the_gated_form_is_the_authors_with_and_without_masked_tiles(name: str, phase: str, published) -> None:
    arrays = published(f"acmil/{name}.npz")
    branches = len(arrays["w/attention.attention_weights.bias"])
    network, ours = filled(mil_acmil.Config(branches=branches, width=32, hidden=16), arrays)
    bags = Bags.of(arrays["x"][0])
    mask = ~arrays["train/masked"].bool().T if phase == "train" else None
    answer = network.answer(bags, mask)
    torch.testing.assert_close(answer.scores.T[None], arrays["eval/attn_logits"], **SEEN)  # raw, whatever is masked
    torch.testing.assert_close(answer.attention(bags).T[None], arrays[f"{phase}/attn_softmax"], **SEEN)
    torch.testing.assert_close(answer.logits, arrays[f"{phase}/bag_logits"], **SEEN)
    if branches > 1:
        torch.testing.assert_close(answer.more["branch_logits"][0], arrays[f"{phase}/branch_logits"], **SEEN)
    losses = network.losses(answer, bags, arrays["y"])
    assert_losses(losses, arrays, phase)
    sum(losses.values()).backward()
    assert_gradients(network, arrays, ours, phase)


def test_the_multi_head_form_is_the_authors_though_no_key_and_no_value_is_ever_made(published) -> None:
    arrays = published("acmil/mha_eval.npz")
    network, ours = filled(mil_acmil.Config(attention="multi_head", branches=4, width=32), arrays)
    bags = Bags.of(arrays["x"][0])
    answer = network(bags)
    scores = answer.scores.unflatten(1, (4, 8)).permute(2, 1, 0)  # [heads, branches, tiles]
    torch.testing.assert_close(scores, arrays["eval/attn_logits"], **SEEN)
    torch.testing.assert_close(answer.logits, arrays["eval/bag_logits"], **SEEN)
    torch.testing.assert_close(answer.more["branch_logits"][0], arrays["eval/branch_logits"], **SEEN)
    losses = network.losses(answer, bags, arrays["y"])
    assert_losses(losses, arrays, "eval")
    sum(losses.values()).backward()
    assert_gradients(network, arrays, ours, "eval")


@torch.no_grad()
def test_the_multi_head_form_says_what_attention_with_keys_and_values_says() -> None:
    torch.manual_seed(0)
    config = mil_acmil.Config(attention="multi_head", branches=3, heads=4, width=16)
    network = mil_acmil.build(config, features=12, classes=2).eval().double()
    nn.init.normal_(network.maps.query)
    bags = Bags.of(torch.randn(30, 12).double())
    mask = torch.rand(30, 12) > 0.4
    answer = network.answer(bags, mask)
    h = network.project(bags.features)

    def heads(rows: torch.Tensor) -> torch.Tensor:
        return rows.view(len(rows), 4, 4).transpose(0, 1)  # [heads, rows, numbers]

    for number, (ask, tell) in enumerate(zip(network.maps.asking, network.maps.telling, strict=True)):
        q = heads(ask.q(network.maps.query[number : number + 1]))
        seen = mask.view(30, 3, 4)[:, number].T[:, None]  # [heads, 1, tiles]
        found = nn.functional.scaled_dot_product_attention(q, heads(ask.k(h)), heads(tell.v(h)), attn_mask=seen)
        vector = tell.norm(tell.out(found.transpose(0, 1).reshape(1, 16)))
        torch.testing.assert_close(network.branch_heads[number](vector), answer.more["branch_logits"][:, number])
    attention = answer.attention(bags).view(30, 3, 4).mean(1)  # of the bag: [tiles, heads]
    values = torch.einsum("nh,hnd->hd", attention, heads(network.maps.bag.v(h)))
    vector = network.maps.bag.norm(network.maps.bag.out(values.reshape(1, 16)))
    torch.testing.assert_close(network.head(vector), answer.logits)


@pytest.mark.parametrize(
    ("features", "gated", "multi_head"),
    [
        (384, 84_369, 416_140),
        (512, 200_593, 1_585_932),
        (768, 398_737, 3_558_540),
        (1024, 662_417, 6_317_580),
        (1536, 1_386_385, 14_194_956),
    ],
)
def test_it_has_as_many_weights_as_published_for_each_encoder(features: int, gated: int, multi_head: int) -> None:
    for attention, weights in (("gated", gated), ("multi_head", multi_head)):
        with torch.device("meta"):
            network = mil_acmil.build(mil_acmil.Config(attention=attention), features=features, classes=2)
        assert sum(weight.numel() for weight in network.parameters()) == weights


@pytest.mark.parametrize(("features", "weights"), [(384, 115_842), (512, 395_522), (768, 888_194), (1024, 1_577_474)])
def test_one_branch_with_heads_has_as_many_weights_as_the_network_aem_publishes(features: int, weights: int) -> None:
    with torch.device("meta"):
        config = mil_acmil.Config(attention="multi_head", branches=1)
        network = mil_acmil.build(config, features=features, classes=2)
    assert sum(weight.numel() for weight in network.parameters()) == weights


def bag_of(*sizes: int, features: int = 12) -> Bags:
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    return Bags(features=torch.randn(sum(sizes), features), offsets=offsets)


def scored(sizes: list[int], maps: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(sum(sizes), maps, generator=random)
    log_sums = torch.stack([part.logsumexp(0) for part in scores.split(sizes)])
    return scores, log_sums, torch.tensor([0, *itertools.accumulate(sizes)])


@given(
    sizes=st.lists(st.integers(1, 25), min_size=1, max_size=4),
    top=st.integers(1, 12),
    share=st.sampled_from([0.0, 0.29, 0.5, 0.6, 1.0]),
    exact=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_what_is_masked_is_among_the_strongest_and_never_everything(sizes, top, share, exact, seed) -> None:
    scores, log_sums, offsets = scored(sizes, 3, seed)
    stays = mil_acmil.kept(scores, log_sums, offsets, top, share, exact, torch.Generator().manual_seed(seed))
    for size, part, stay in zip(sizes, scores.split(sizes), stays.split(sizes), strict=True):
        among = min(top, size)
        for k in range(3):
            out = (~stay[:, k]).nonzero()[:, 0].tolist()
            assert set(out) <= set(part[:, k].topk(among).indices.tolist())
            assert len(out) < size
            if exact:
                assert len(out) == min(int(among * round(share * 100)) // 100, size - 1)


def test_a_mask_is_the_same_from_the_same_seed_and_another_from_another_and_branches_draw_for_themselves() -> None:
    scores, log_sums, offsets = scored([200, 80], 1, 0)
    scores, log_sums = scores.expand(-1, 5), log_sums.expand(-1, 5)  # five branches that score alike

    def drawn(seed: int) -> torch.Tensor:
        return mil_acmil.kept(scores, log_sums, offsets, 10, 0.6, True, torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert not all(torch.equal(drawn(1)[:, 0], drawn(1)[:, k]) for k in range(1, 5))


def test_by_chance_each_of_the_strongest_goes_as_often_as_its_share_says() -> None:
    scores, log_sums, offsets = scored([50], 400, 3)
    random = torch.Generator().manual_seed(0)
    by_chance = (~mil_acmil.kept(scores, log_sums, offsets, 10, 0.6, False, random)).sum(0)
    assert by_chance.float().mean().item() == pytest.approx(6, abs=4 * (10 * 0.6 * 0.4 / 400) ** 0.5)
    assert len(by_chance.unique()) > 3  # not always six
    ranked = scores.topk(10, dim=0).indices
    gone = ~mil_acmil.kept(scores, log_sums, offsets, 10, 0.6, True, random)
    assert (gone.gather(0, ranked).float().mean(1) - 0.6).abs().max() < 4 * (0.24 / 400) ** 0.5


def test_masking_is_for_training_alone_and_the_default_does_none() -> None:
    bags = bag_of(40, 30)
    config = mil_acmil.Config(faithful=True)
    assert config.masked_share == 0.6 and mil_acmil.Config().masked_share == 0
    network = mil_acmil.build(config, features=12, classes=2)
    answer = network(bags)
    assert answer.mask is not None and (~answer.mask).sum(0).tolist() == [12] * 5  # 6 of each bag
    assert answer.attention(bags)[~answer.mask].eq(0).all()
    assert network.eval()(bags).mask is None
    assert mil_acmil.build(mil_acmil.Config(), features=12, classes=2)(bags).mask is None


def test_torchs_seed_fixes_the_mask_of_a_training_step() -> None:
    bags = bag_of(60)
    network = mil_acmil.build(mil_acmil.Config(drop=0.5), features=12, classes=2)
    masks = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        masks.append(network(bags).mask)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("attention", ["gated", "multi_head"])
def test_a_bag_smaller_than_the_number_masked_trains(attention: str) -> None:
    bags = bag_of(1, 3, 25, features=16)
    network = mil_acmil.build(mil_acmil.Config(attention=attention, drop=1.0, width=16), features=16, classes=2)
    losses = network.losses(network(bags), bags, torch.tensor([0, 1, 1]))
    sum(losses.values()).backward()
    assert all(weight.grad.isfinite().all() for weight in network.parameters())


def test_the_likeness_of_maps_is_the_mean_cosine_of_their_pairs() -> None:
    sizes = [7, 1, 12]
    scores, log_sums, offsets = scored(sizes, 3 * 2, 5)
    attention = torch.exp(scores - log_sums.repeat_interleave(torch.tensor(sizes), 0))
    expected = []
    for part in attention.split(sizes):
        for head in range(2):
            maps = part[:, head::2]
            pairs = itertools.combinations(range(3), 2)
            expected += [torch.cosine_similarity(maps[:, i], maps[:, j], 0) for i, j in pairs]
    torch.testing.assert_close(mil_acmil.likeness(attention, offsets, 3), torch.stack(expected).mean())
    same = attention[:, :1].expand(-1, 6)
    assert mil_acmil.likeness(same, offsets, 3).item() == pytest.approx(1)


def test_a_width_that_nobody_gave_is_a_multiple_of_the_heads() -> None:
    for features, width in ((100, 48), (9, 8), (1024, 512)):
        with torch.device("meta"):
            network = mil_acmil.build(mil_acmil.Config(attention="multi_head"), features=features, classes=2)
        assert network.head.in_features == width


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="8 heads for a width of 12"):
        mil_acmil.build(mil_acmil.Config(attention="multi_head", width=12), features=16, classes=2)


@pytest.mark.parametrize(
    "options",
    [dict(branches=0), dict(top=-1), dict(drop=1.5), dict(dropout=1.0), dict(heads=0), dict(attention="loud")],
)
def test_a_config_that_cannot_be_is_refused(options, unchecked) -> None:
    with pytest.raises(ValueError, match=r"mil_acmil was given .* Correct"):
        mil_acmil.Config(**options)
