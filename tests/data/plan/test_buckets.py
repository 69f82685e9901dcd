"""Tests of videox.data.plan.buckets: the published size tables, distributions of draws, cropping."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN
from hypothesis import example, given
from hypothesis import strategies as st

from videox.data.plan.buckets import (
    ASPECT_RATIOS_512,
    CROP_RATIOS,
    Assignment,
    BucketDraws,
    Fate,
    SizePolicy,
    assign_buckets,
    bucket_sides,
    clip_starts,
    crop_frames,
    crop_share,
    draw_sizes,
    nearest_ratio,
    size_ladder,
    static_fates,
)
from videox.errors import FLAGS, UserError
from videox.rng import Purpose, uniform
from videox.shapes import USUAL, Bucket, token_count

KEYS = [key for key, _, _ in ASPECT_RATIOS_512]
PIXELS = st.integers(16, 8192)
DRAWS = 40_000

BUCKETS = SizePolicy(enable_bucket=True)
ADAPT = replace(BUCKETS, random_hw_adapt=True)
TOKENS = replace(BUCKETS, token_length=True)
BOTH = replace(ADAPT, token_length=True)


def sized(policy: SizePolicy, image: int, video: int, token: int = 512, n_frames: int = 49) -> SizePolicy:
    return replace(
        policy, image_sample_size=image, video_sample_size=video, token_sample_size=token, n_frames=n_frames
    )


def draws(purpose: Purpose, count: int = DRAWS) -> np.ndarray:
    return uniform(42, np.arange(count), purpose)


def assigned(
    policy: SizePolicy, kind: int, height: int, width: int, frames: int, count: int = 4000, seed: int = 42
) -> Assignment:
    """Return the buckets of `count` samples of one source."""

    def column(value: int) -> np.ndarray:
        return np.full(count, value, np.int32)

    size, ratio, length = (
        uniform(seed, np.arange(count), purpose) for purpose in (Purpose.SIZE, Purpose.RATIO, Purpose.FRAMES)
    )
    return assign_buckets(
        policy, column(kind), column(height), column(width), column(frames), BucketDraws(size, ratio, length),
    )  # fmt: skip


def buckets_of(assignment: Assignment) -> set[Bucket]:
    columns = (assignment.frames.tolist(), assignment.height.tolist(), assignment.width.tolist())
    return {Bucket(*values) for values in zip(*columns, strict=True)}


def chi_square(counts: np.ndarray, shares: np.ndarray) -> float:
    """Return how many standard deviations the chi-square statistic of the given shares is above its mean."""
    expected = counts.sum() * shares
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * max(freedom, 1))


# ------------------------------------------------------------------------------------------------- aspect ratios


def test_ratios_are_those_of_diffusers_and_seven_more() -> None:
    published = {float(key): tuple(int(side) for side in size) for key, size in ASPECT_RATIO_512_BIN.items()}
    more = {
        0.26: (256, 992), 0.27: (256, 960), 2.89: (832, 288), 3.11: (896, 288),
        3.62: (928, 256), 3.75: (960, 256), 3.88: (992, 256),
    }  # fmt: skip
    assert len(published) == 33
    assert not set(published) & set(more)
    assert {key: (height, width) for key, height, width in ASPECT_RATIOS_512} == published | more
    assert sorted(KEYS) == KEYS
    assert len(KEYS) == 40


@given(PIXELS, PIXELS)
@example(51, 200)  # as near to 0.25 as to 0.26
@example(1080, 1920)
def test_nearest_ratio_has_the_smallest_distance(height: int, width: int) -> None:
    distances = [abs(Fraction(str(key)) - Fraction(height, width)) for key in KEYS]
    position = int(nearest_ratio(np.array([height]), np.array([width]))[0])
    assert distances[position] == min(distances)


@pytest.mark.parametrize(
    ("target", "size"),
    [
        (256, (192, 336)), (320, (240, 416)), (480, (352, 624)), (512, (384, 672)),
        (640, (480, 832)), (960, (720, 1248)), (1024, (768, 1344)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("source", [(1080, 1920), (720, 1280), (2160, 3840)])
def test_sizes_of_16_to_9(target: int, size: tuple[int, int], source: tuple[int, int]) -> None:
    policy = sized(BUCKETS, image=target, video=target)
    assert buckets_of(assigned(policy, 0, *source, 1)) == {Bucket(1, *size)}
    assert buckets_of(assigned(policy, 1, *source, 1000)) == {Bucket(49, *size)}
    assert KEYS[int(nearest_ratio(np.array([source[0]]), np.array([source[1]]))[0])] == 0.57


@pytest.mark.parametrize(
    ("target", "tokens"), [(320, 8_190), (480, 18_018), (512, 21_168), (640, 32_760), (960, 73_710)]
)
def test_tokens_of_16_to_9(target: int, tokens: int) -> None:
    policy = sized(BUCKETS, image=target, video=target, n_frames=81)
    (bucket,) = buckets_of(assigned(policy, 1, 1080, 1920, 1000))
    assert token_count(bucket) == tokens


@given(st.integers(0, 39), st.integers(32, 8192))
def test_sides_are_floored_as_the_formula_says(position: int, target: int) -> None:
    _, height, width = ASPECT_RATIOS_512[position]
    wanted = tuple(
        max(math.floor(Fraction(x, 512) * target / USUAL.grid) * USUAL.grid, USUAL.grid) for x in (height, width)
    )
    found = bucket_sides(np.array([position]), np.array([target]))
    assert (int(found[0][0]), int(found[1][0])) == wanted


# -------------------------------------------------------------------------------------------------- target sizes


@given(st.integers(32, 4096), st.integers(32, 4096))
def test_a_size_ladder_rises_by_128_and_ends_at_the_last_size(one: int, other: int) -> None:
    foot, top = sorted((one, other))
    rungs = size_ladder(foot, top)
    assert rungs[0] == foot
    assert rungs[-1] == top
    assert all(b - a == 128 for a, b in pairwise(rungs[:-1]))
    assert len(rungs) == 1 or 0 < rungs[-1] - rungs[-2] <= 128


TO_1024 = (256, 384, 512, 640, 768, 896, 1024)
FROM_512 = (512, 640, 768, 896, 1024)


@pytest.mark.parametrize(
    ("policy", "image", "video", "images", "videos"),
    [
        # neither: each kind has its own size
        (BUCKETS, 512, 512, (512,), (512,)),
        (BUCKETS, 1024, 256, (1024,), (256,)),
        (BUCKETS, 256, 1024, (256,), (1024,)),
        # random_hw_adapt alone: images up to the larger, videos up to the smaller of the two
        (ADAPT, 1024, 1024, FROM_512, FROM_512),
        (ADAPT, 1024, 256, TO_1024, (256,)),
        (ADAPT, 256, 1024, TO_1024, (256,)),
        (ADAPT, 640, 960, (512, 640, 768, 896, 960), (512, 640)),
        (ADAPT, 512, 512, (512,), (512,)),
        # training_with_video_token_length, with or without random_hw_adapt: both between the two
        (TOKENS, 1024, 256, TO_1024, TO_1024),
        (TOKENS, 256, 1024, TO_1024, TO_1024),
        (BOTH, 1024, 256, TO_1024, TO_1024),
        (BOTH, 256, 1024, TO_1024, TO_1024),
        (BOTH, 640, 640, (640,), (640,)),
        (TOKENS, 1000, 300, (300, 428, 556, 684, 812, 940, 1000), (300, 428, 556, 684, 812, 940, 1000)),
    ],
)
def test_size_ladders(
    policy: SizePolicy, image: int, video: int, images: tuple[int, ...], videos: tuple[int, ...]
) -> None:
    policy = sized(policy, image, video)
    assert policy.image_sizes() == images
    assert policy.video_sizes() == videos
    # and these are the sizes of samples of a large source
    assert set(assigned(policy, 0, 4000, 4000, 1).target.tolist()) == set(images)
    assert set(assigned(policy, 1, 4000, 4000, 1000).target.tolist()) == set(videos)


@given(st.integers(32, 2048), st.integers(32, 2048), st.sampled_from([ADAPT, TOKENS, BOTH]))
def test_the_order_of_the_two_sizes_does_not_matter(one: int, other: int, policy: SizePolicy) -> None:
    given_so, swapped = sized(policy, one, other), sized(policy, other, one)
    assert given_so.image_sizes() == swapped.image_sizes()
    assert given_so.video_sizes() == swapped.video_sizes()


FRAME_TABLES = [
    # n_frames, token_sample_size, frames by size
    (49, 512, {256: 49, 512: 49, 640: 29, 768: 21, 896: 13, 1024: 9}),
    (49, 1024, {256: 49, 384: 49, 512: 49, 640: 49, 768: 49, 896: 49, 1024: 49}),
    (81, 512, {256: 81, 384: 81, 512: 81, 640: 49, 768: 33, 896: 25, 1024: 17}),
]


@pytest.mark.parametrize(("image", "video"), [(256, 1024), (1024, 256)])
@pytest.mark.parametrize("policy", [TOKENS, BOTH])
@pytest.mark.parametrize(("n_frames", "token", "table"), FRAME_TABLES)
def test_frames_at_each_size(
    n_frames: int, token: int, table: dict[int, int], policy: SizePolicy, image: int, video: int
) -> None:
    policy = sized(policy, image, video, token, n_frames)
    assert {size: policy.max_frames(size) for size in table} == table
    found = assigned(policy, 1, 3000, 3000, 1000)  # square and larger than every size
    shown = {(bucket.frames, bucket.height, bucket.width) for bucket in buckets_of(found)}
    assert shown == {(policy.max_frames(size), size, size) for size in TO_1024}
    assert shown >= {(frames, size, size) for size, frames in table.items()}


@pytest.mark.parametrize(("image", "video"), [(256, 1024), (1024, 256)])
def test_a_token_budget_of_1024_gives_the_published_ranges(image: int, video: int) -> None:
    policy = sized(TOKENS, image, video, token=1024)
    clips = sorted(buckets_of(assigned(policy, 1, 3000, 3000, 1000)))
    assert clips[0] == Bucket(49, 256, 256)
    assert clips[-1] == Bucket(49, 1024, 1024)
    images = sorted(buckets_of(assigned(policy, 0, 3000, 3000, 1)))
    assert [image.height for image in images] == list(TO_1024)


@pytest.mark.parametrize(("image", "video"), [(1024, 1024), (256, 1024), (1024, 256)])
def test_adapted_sizes_keep_all_frames(image: int, video: int) -> None:
    policy = sized(ADAPT, image, video)
    assert set(assigned(policy, 1, 3000, 3000, 1000).frames.tolist()) == {49}


@given(
    st.integers(0, 60).map(lambda k: 4 * k + 1), st.integers(32, 2048), st.integers(32, 2048), st.integers(32, 2048),
    st.sampled_from([TOKENS, BOTH]), st.integers(16, 4000), st.integers(16, 4000), st.integers(1, 600), st.integers(1, 8),
)  # fmt: skip
def test_every_token_length_clip_is_within_the_budget(
    n_frames: int, token: int, image: int, video: int, policy: SizePolicy, height: int, width: int, frames: int, stride: int
) -> None:  # fmt: skip
    policy = replace(sized(policy, image, video, token, n_frames), stride=stride)
    found = assigned(policy, 1, height, width, frames, count=64)
    spent = found.frames.astype(np.int64) * found.target**2
    assert np.all((spent <= n_frames * token**2) | (found.frames == 1))
    assert np.all(found.frames % 4 == 1)
    assert np.all((found.frames.astype(np.int64) - 1) * stride < frames)  # the clip is within its video
    assert np.all(found.height % USUAL.grid == 0)
    assert np.all(found.width % USUAL.grid == 0)


@given(st.integers(1, 300), st.integers(1, 9))
def test_a_clip_is_as_long_as_its_video_allows(frames: int, stride: int) -> None:
    policy = replace(BUCKETS, n_frames=49, stride=stride)
    fit = len(range(0, frames, stride))
    assert set(assigned(policy, 1, 600, 600, frames, count=4).frames.tolist()) == {min(49, (fit - 1) // 4 * 4 + 1)}


def test_an_image_is_one_frame_with_any_flags() -> None:
    policy = replace(sized(BOTH, 1024, 256, n_frames=81), random_frame_crop=True, random_ratio_crop=True)
    assert set(assigned(policy, 0, 600, 900, 1).frames.tolist()) == {1}


# --------------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_largest_size_has_three_quarters_of_the_draws(count: int) -> None:
    sizes = tuple(256 + 128 * i for i in range(count))
    drawn = draw_sizes(sizes, np.full(DRAWS, 4000.0), draws(Purpose.SIZE), even=False)
    counts = np.array([np.count_nonzero(drawn == size) for size in sizes])
    shares = np.array([0.25 / (count - 1)] * (count - 1) + [0.75])
    assert abs(chi_square(counts, shares)) < 5
    assert abs(counts[-1] / DRAWS - 0.75) < 0.01


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_uniform_draws_of_sizes_are_uniform(count: int) -> None:
    sizes = tuple(256 + 128 * i for i in range(count))
    drawn = draw_sizes(sizes, np.full(DRAWS, 4000.0), draws(Purpose.SIZE), even=True)
    counts = np.array([np.count_nonzero(drawn == size) for size in sizes])
    assert counts.sum() == DRAWS
    assert abs(chi_square(counts, np.full(count, 1 / count))) < 5 or count == 1


def test_only_token_length_videos_draw_sizes_uniformly() -> None:
    def share_of_largest(policy: SizePolicy, kind: int) -> float:
        target = assigned(sized(policy, 1024, 1024 if policy is ADAPT else 256), kind, 3000, 3000, 1000, DRAWS).target
        return float(np.mean(target == 1024))

    assert abs(share_of_largest(BOTH, 1) - 1 / 7) < 0.01
    assert abs(share_of_largest(TOKENS, 1) - 1 / 7) < 0.01
    assert abs(share_of_largest(BOTH, 0) - 0.75) < 0.01
    assert abs(share_of_largest(ADAPT, 0) - 0.75) < 0.01
    assert abs(share_of_largest(ADAPT, 1) - 0.75) < 0.01


@given(PIXELS, PIXELS, st.booleans())
@example(16, 16, True)
def test_sizes_far_above_the_source_are_never_drawn(height: int, width: int, even: bool) -> None:
    mean = (height + width) / 2
    drawn = draw_sizes(TO_1024, np.full(2000, mean), draws(Purpose.SIZE, 2000), even=even)
    allowed = {size for size in TO_1024 if size <= 1.25 * mean} or {256}
    assert set(drawn.tolist()) == allowed


@pytest.mark.parametrize(("mean", "largest"), [(409, 384), (410, 512), (409.6, 512), (819.2, 1024), (100, 256)])
def test_the_limit_is_a_quarter_above_the_mean_side(mean: float, largest: int) -> None:
    assert draw_sizes(TO_1024, np.full(1000, mean), draws(Purpose.SIZE, 1000), even=True).max() == largest


@pytest.mark.parametrize(("policy", "kind"), [(ADAPT, 0), (ADAPT, 1), (TOKENS, 0), (TOKENS, 1), (BOTH, 0), (BOTH, 1)])
def test_a_small_source_is_not_upscaled_beyond_the_limit(policy: SizePolicy, kind: int) -> None:
    policy = sized(policy, 1024, 1024 if policy is ADAPT else 256)
    found = assigned(policy, kind, 400, 624, 1000)  # mean side 512, so at most 640
    assert found.target.max() == 640
    assert assigned(policy, kind, 60, 40, 1000).target.max() == min(found.target)


@pytest.mark.parametrize("whole", [5, 9, 13, 49, 81])
def test_one_clip_in_ten_is_shortened_uniformly(whole: int) -> None:
    found = crop_frames(np.full(DRAWS, whole), draws(Purpose.FRAMES))
    shorter = list(range(5, whole, 4))
    counts = np.array([np.count_nonzero(found == frames) for frames in [*shorter, whole]])
    assert counts.sum() == DRAWS
    if not shorter:
        assert counts[-1] == DRAWS
        return
    assert abs(counts[-1] / DRAWS - 0.9) < 0.01
    assert len(shorter) == 1 or abs(chi_square(counts[:-1], np.full(len(shorter), 1 / len(shorter)))) < 5


def test_a_frame_crop_reaches_the_bucket() -> None:
    policy = replace(sized(TOKENS, 512, 512, n_frames=81), random_frame_crop=True, stride=1)
    found = assigned(policy, 1, 700, 700, 60, count=10_000).frames  # 57 of 81 frames are available
    assert set(found.tolist()) == set(range(5, 58, 4))
    assert abs(np.mean(found == 57) - 0.9) < 0.01
    assert set(assigned(policy, 1, 700, 700, 4, count=100).frames.tolist()) == {1}


# Weights out of 62: nearly square shapes most often; a ratio and its inverse have the same weight.
CROP_WEIGHTS = {
    0.42: 1, 0.5: 2, 0.57: 4, 0.68: 4, 0.78: 4, 0.88: 4, 0.94: 8, 1.0: 8, 1.07: 8, 1.13: 4, 1.29: 4, 1.46: 4, 1.75: 4,
    2.0: 2, 2.4: 1,
}  # fmt: skip


def test_ratio_crop_draws_by_weight_for_any_source() -> None:
    policy = replace(sized(BUCKETS, 512, 512), random_ratio_crop=True)
    weights = np.array(list(CROP_WEIGHTS.values()), float)
    assert dict(CROP_RATIOS) == CROP_WEIGHTS
    sizes = {key: (height, width) for key, height, width in ASPECT_RATIOS_512}
    for height, width in [(1080, 1920), (900, 300)]:
        found = assigned(policy, 0, height, width, 1, DRAWS)
        pairs = list(zip(found.height.tolist(), found.width.tolist(), strict=True))
        counts = np.array([pairs.count(sizes[key]) for key, _ in CROP_RATIOS])
        assert counts.sum() == DRAWS
        assert abs(chi_square(counts, weights / weights.sum())) < 5


# --------------------------------------------------------------------------------------------- fixed sizes and squares


def test_fix_sample_size_applies_to_every_sample() -> None:
    policy = replace(sized(BOTH, 1024, 256, n_frames=49), fix_sample_size=(490, 840))
    assert buckets_of(assigned(policy, 0, 900, 300, 1)) == {Bucket(1, 480, 832)}
    assert buckets_of(assigned(policy, 1, 300, 900, 1000)) == {Bucket(49, 480, 832)}  # without a limit on frames


@pytest.mark.parametrize(("image", "video"), [(512, 256), (500, 300)])
def test_without_buckets_everything_is_square(image: int, video: int) -> None:
    policy = sized(SizePolicy(), image, video)
    side = {size: size // USUAL.grid * USUAL.grid for size in (image, video)}
    assert buckets_of(assigned(policy, 0, 900, 300, 1)) == {Bucket(1, side[image], side[image])}
    assert buckets_of(assigned(policy, 1, 300, 900, 1000)) == {Bucket(49, side[video], side[video])}


# ---------------------------------------------------------------------------------------------------- invalid settings


@pytest.mark.parametrize(
    ("flag", "changed"),
    [
        ("--random_hw_adapt", {"random_hw_adapt": True}),
        ("--training_with_video_token_length", {"token_length": True}),
        ("--random_frame_crop", {"random_frame_crop": True}),
        ("--random_ratio_crop", {"random_ratio_crop": True}),
        ("--fix_sample_size", {"fix_sample_size": (480, 832)}),
        ("--fix_sample_size", {"fix_sample_size": (16, 832), "enable_bucket": True}),
        ("--video_sample_n_frames", {"n_frames": 80}),
        ("--video_sample_n_frames", {"n_frames": 0}),
        ("--video_sample_stride", {"stride": 0}),
        ("--video_sample_size", {"video_sample_size": 31}),
        ("--image_sample_size", {"image_sample_size": 8193}),
        ("--token_sample_size", {"token_sample_size": 0}),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flag: str, changed: dict) -> None:
    with pytest.raises(UserError) as refused:
        SizePolicy(**changed)
    assert refused.value.exit_code == FLAGS
    assert refused.value.where == flag
    assert refused.value.hint


@given(st.integers(-5, 500).filter(lambda n: n < 1 or n % 4 != 1))
def test_the_hint_for_an_invalid_length_names_its_neighbours(n_frames: int) -> None:
    with pytest.raises(UserError) as refused:
        SizePolicy(n_frames=n_frames)
    near = [int(word) for word in refused.value.hint.split() if word.isdigit()]
    assert near[1] == near[0] + 4
    assert all(SizePolicy(n_frames=n).n_frames == n for n in near)
    assert near[0] < max(n_frames, 2) < near[1] + 1


# --------------------------------------------------------------------------------------------------------- fates


def fates(policy: SizePolicy, rows: list[tuple[int, int, int, int, bool]]) -> list[Fate]:
    kind, height, width, frames, usable = (np.array(column) for column in zip(*rows, strict=True))
    return [Fate(fate) for fate in static_fates(policy, kind, height, width, frames, usable)]


def test_fates_of_rows() -> None:
    rows = [
        (1, 480, 640, 300, True),
        (0, 480, 640, 1, True),
        (1, 480, 640, 64, True),  # 16 frames at stride 4
        (1, 480, 640, 65, True),  # 17
        (1, 480, 640, 0, True),
        (0, 15, 640, 1, True),
        (0, 16, 640, 1, True),
        (1, 15, 640, 0, True),
        (1, 480, 640, 300, False),
        (1, 0, 0, 0, False),
    ]
    plain = fates(SizePolicy(n_frames=17, stride=4), rows)
    trained, short, small, refused = Fate.TRAINED, Fate.TOO_SHORT, Fate.TOO_SMALL, Fate.REFUSED
    assert plain == [trained, trained, short, trained, short, small, trained, small, refused, refused]
    bucketed = fates(replace(BUCKETS, n_frames=17, stride=4), rows)
    assert bucketed == [trained, trained, trained, trained, short, small, trained, small, refused, refused]


# -------------------------------------------------------------------------------------------- cropping and clip starts


def crop_by_hand(height: int, width: int, bucket_height: int, bucket_width: int) -> Fraction:
    """Return the cropped share of the area when the source is scaled to cover the bucket."""
    scale = max(Fraction(bucket_height, height), Fraction(bucket_width, width))
    scaled = (height * scale) * (width * scale)
    return 1 - Fraction(bucket_height * bucket_width) / scaled


@given(PIXELS, PIXELS, PIXELS, PIXELS)
@example(1080, 1920, 384, 672)
def test_crop_share_is_the_cropped_area(height: int, width: int, bucket_height: int, bucket_width: int) -> None:
    share = crop_share(np.array([height]), np.array([width]), np.array([bucket_height]), np.array([bucket_width]))
    assert math.isclose(share[0], crop_by_hand(height, width, bucket_height, bucket_width), abs_tol=1e-12)
    assert 0 <= share[0] < 1


@given(st.integers(1, 40), st.integers(0, 9), st.integers(1, 6))
def test_the_clip_fits_at_every_start(extra: int, k: int, stride: int) -> None:
    kept = 4 * k + 1
    frames = (kept - 1) * stride + extra  # `extra` starts are possible
    starts = clip_starts(np.full(4000, frames), np.full(4000, kept), stride, draws(Purpose.START, 4000))
    last = starts + (kept - 1) * stride
    assert starts.min() >= 0
    assert last.max() < frames
    assert set(starts.tolist()) == set(range(extra))
    assert extra == 1 or abs(chi_square(np.bincount(starts, minlength=extra), np.full(extra, 1 / extra))) < 6


@pytest.mark.parametrize("draw", [2.0**-54, 0.5, 1 - 2.0**-53])
def test_extreme_draws_stay_in_range(draw: float) -> None:
    one = np.array([draw])
    assert 0 <= clip_starts(np.array([2**31 - 1]), np.array([1]), 1, one)[0] < 2**31 - 1
    assert crop_frames(np.array([81]), one)[0] in range(5, 82, 4)
    for even in (True, False):
        assert draw_sizes(TO_1024, np.array([4000.0]), one, even)[0] in TO_1024
    policy = replace(BUCKETS, random_ratio_crop=True)
    column = np.ones(1, np.int32)
    found = assign_buckets(policy, column, 600 * column, 600 * column, 900 * column, BucketDraws(one, one, one))
    assert found.frames[0] == 17
