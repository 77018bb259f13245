"""A stranger at the board's port, without its secret, neither speaks on it nor ends a run."""

import socket

import pytest
import torch.distributed as dist

from fastrepa.runtime.survival import Board, _Verdict
from fastrepa.runtime.world import World


@pytest.fixture
def board(world, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    return Board(World(), None, 2.0)


def stranger_at(board):
    return dist.TCPStore("127.0.0.1", board._store.port, is_master=False, wait_for_workers=False)


def test_it_listens_only_where_the_ranks_see_it(board):
    with socket.create_connection(("127.0.0.1", board._store.port)):
        pass
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", board._store.port)):
        pass


def test_a_stranger_says_nothing_in_a_ranks_name(board):
    board.write("beat/0", "7")
    stranger, verdict = stranger_at(board), board._name("verdict")
    beat = board._store.get(board._name("beat/0")).decode()
    for words in ("1 0 ended by a stranger", "", "\0" * 99, beat, beat.replace(" 7", " 8")):
        for key in ("verdict", verdict):
            stranger.set(key, words)
        assert board.read("verdict") is None
    # What a rank says is heard all the same, by all.
    told = _Verdict(76, (1,), "rank 1 (h\u00f6st) lost").written()
    assert board.write_first("verdict", told) == told
    assert board.write_first("verdict", "1 2 another") == told
    assert board.read_all(["verdict", "beat/0", "beat/1"]) == [told, "7", None]
    stranger.set(board._name("beat/0"), beat.replace(" 7", " 8"))
    assert board.read("beat/0") is None  # as if that rank were silent
    stranger.delete_key(verdict)
    assert board.read("verdict") is None
    assert board.write_first("verdict", told) == told
