"""Secret noise: its distribution, its independence, its key."""

from __future__ import annotations

import stat

import numpy as np
import pytest
from scipy import stats

from flocktune.errors import UserError
from flocktune.privacy.noise import derive_key, keystream, normals, read_or_make_key, uniforms

KEY = bytes(range(32))


@pytest.mark.parametrize("number", range(4))
def test_normals_are_standard_normal(number: int) -> None:
    drawn = normals(derive_key(KEY, number), (200, 1000)).numpy().ravel()
    n = len(drawn)
    assert abs(drawn.mean()) < 4 / np.sqrt(n)
    assert abs(drawn.var() - 1) < 4 * np.sqrt(2 / n)
    assert abs(stats.kurtosis(drawn)) < 4 * np.sqrt(24 / n)
    assert abs(stats.skew(drawn)) < 4 * np.sqrt(6 / n)
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    assert np.abs(drawn).max() < 8.7


def test_normals_are_independent_of_their_neighbours_and_of_other_keys() -> None:
    """Box and Muller's pairs too: sine and cosine of one angle."""
    n = 100_000
    drawn = normals(derive_key(KEY, 1, "a"), (n,)).numpy()
    others = [normals(derive_key(KEY, 1, "b"), (n,)).numpy(), normals(derive_key(KEY, 2, "a"), (n,)).numpy()]
    for left, right in [(drawn[:-1], drawn[1:]), (drawn[: n // 2], drawn[n // 2 :]), *((drawn, o) for o in others)]:
        assert abs(np.corrcoef(left, right)[0, 1]) < 4 / np.sqrt(len(left))
        assert abs(np.corrcoef(left**2, right**2)[0, 1]) < 4 / np.sqrt(len(left)), "nor are their sizes"


def test_large_tensors_do_not_repeat_themselves() -> None:
    drawn = normals(KEY, ((1 << 20) + 7,)).numpy()
    assert len(np.unique(drawn)) == len(drawn)


def test_uniforms_are_uniform_and_never_at_the_ends() -> None:
    drawn = uniforms(KEY, 200_000)
    assert stats.kstest(drawn, "uniform").pvalue > 1e-3
    assert drawn.min() > 0
    assert drawn.max() < 1


def test_the_stream_is_chacha20() -> None:
    """RFC 8439, A.1, test vector 1: key and nonce zero, counter 0."""
    assert keystream(bytes(32), 16).hex() == "76b8e0ada0f13d90405d6ae55386bd28"


def test_keys_are_derived_by_their_whole_path() -> None:
    paths = [(1, "a"), ("1", "a"), (1, "a", "b"), ("a", 1), (2, "a"), ()]
    assert len({derive_key(KEY, *path) for path in paths}) == len(paths)
    assert derive_key(KEY, 1, "a") == derive_key(KEY, 1, "a")
    assert derive_key(bytes(32), 1, "a") != derive_key(KEY, 1, "a")


def test_a_key_is_made_once_and_readable_by_its_user_alone(tmp_path) -> None:
    path = tmp_path / "secret.key"
    key = read_or_make_key(path)
    assert len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_or_make_key(path) == key
    assert read_or_make_key(tmp_path / "other.key") != key
    path.write_bytes(key[:-1])
    with pytest.raises(UserError, match="31 bytes"):
        read_or_make_key(path)
    path.unlink()
    with pytest.raises(UserError, match="nothing there"):
        read_or_make_key(path, may_make=False)
