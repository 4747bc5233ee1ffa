"""Which device gets which shard next, and what happens to a shard whose worker died."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from imagemill.records import IsolationReason, Lease, Shard
from imagemill.workers.leases import Leases

CRASH, TIMEOUT = IsolationReason.CRASH, IsolationReason.TIMEOUT


def shards(count: int, groups: int = 1) -> list[Shard]:
    return [
        Shard(number, 10 * number, 10, number * groups // count, "plan-00000-00000.parquet", number)
        for number in range(count)
    ]


def test_shards_are_leased_in_plan_order() -> None:
    """One after the other, each once, whichever worker asks."""
    leases = Leases(shards(4))
    taken = [leases.next(position) for position in (1, 0, 0, 1)]
    assert [lease.shard.number for lease in taken if lease] == [0, 1, 2, 3]
    assert leases.next(0) is None
    assert leases.remaining == 4


def test_a_device_takes_its_own_sub_folder_first_and_then_helps() -> None:
    """If sub-folders are assigned to devices; a device that joined later has none and helps from the
    beginning.
    """
    leases = Leases(shards(6, groups=2), by_group=True)
    assert [leases.next(1).shard.number for _ in range(3)] == [3, 4, 5]  # type: ignore[union-attr]
    assert leases.next(1).shard.number == 0  # type: ignore[union-attr]
    assert leases.next(7).shard.number == 1  # type: ignore[union-attr]


def test_a_dead_workers_shard_is_next_with_its_images_quarantined() -> None:
    """The images that its threads were at, in this shard and no other."""
    leases = Leases(shards(3))
    lease = leases.next(0)
    assert lease is not None
    leases.return_dead(lease, active=(3, 25), timed_out=())
    again = leases.next(0)
    assert again == Lease(lease.shard, {3: CRASH})


def test_an_image_that_hangs_alone_too_is_given_up() -> None:
    """The first time it is quarantined; the second time reading it hangs."""
    leases = Leases(shards(1))
    for expected in ({4: TIMEOUT}, {4: IsolationReason.HUNG_READ}):
        lease = leases.next(0)
        assert lease is not None
        leases.return_dead(lease, active=(4,), timed_out=(4,))
        assert (
            leases._isolated[-1].quarantined == expected
            if leases._isolated
            else leases._queues[0][0].quarantined == expected
        )


def test_a_shard_in_flight_at_two_deaths_is_isolated() -> None:
    """No other shard is leased beside it, and a worker with leases does not get it."""
    leases = Leases(shards(3))
    for _ in range(2):
        lease = leases.next(0)
        assert lease is not None
        assert (lease.shard.number, lease.isolate) == (0, False)
        leases.return_dead(lease)
    other = Lease(shards(3)[2])
    assert leases.next(0, [other]) is None
    alone = leases.next(0)
    assert alone is not None
    assert (alone.shard.number, alone.isolate) == (0, True)
    assert leases.next(0, [alone]) is None
    assert leases.next(1).shard.number == 1  # type: ignore[union-attr]


def test_lost_nodes_weigh_half_of_deaths() -> None:
    """Three spot nodes that are reclaimed leave an innocent shard what it is; a fourth, or a death
    and two of them, are suspicious.
    """
    leases = Leases(shards(2))
    for _ in range(3):
        lease = leases.next(0)
        assert lease is not None
        leases.return_lost(lease)
    lease = leases.next(0)
    assert lease is not None
    assert (lease.shard.number, lease.isolate) == (0, False)
    leases.return_lost(lease)
    assert leases.next(0).isolate  # type: ignore[union-attr]


def test_a_commit_clears_a_shards_name() -> None:
    """Deaths before a commit do not count against the shard afterwards."""
    leases = Leases(shards(1))
    lease = leases.next(0)
    assert lease is not None
    leases.return_dead(lease)
    again = leases.next(0)
    assert again is not None
    leases.commit(0)
    assert leases.remaining == 0
    for _ in range(3):  # the second loss would be enough if the death still counted
        leases.return_lost(again)
        taken = leases.next(0)
        assert taken is not None
        assert not taken.isolate
    leases.return_lost(again)
    assert leases.next(0).isolate  # type: ignore[union-attr]


def test_a_timeout_stays_the_reason_whatever_the_next_worker_dies_of() -> None:
    """Its worker was killed for its sake, and the next one dies of something else: its status is
    `timeout`, not `crashed_decoder`.
    """
    leases = Leases(shards(1))
    lease = leases.next(0)
    assert lease is not None
    leases.return_dead(lease, active=(4, 5), timed_out=(4,))
    again = leases.next(0)
    assert again is not None
    assert again.quarantined == {4: TIMEOUT, 5: CRASH}
    leases.return_dead(again, active=(4, 5))
    alone = leases.next(0)
    assert alone == Lease(lease.shard, {4: TIMEOUT, 5: CRASH}, isolate=True)


def test_a_lost_worker_keeps_the_quarantined_images() -> None:
    """What earlier deaths revealed about a shard's images is not lost with a node."""
    leases = Leases(shards(1))
    leases.next(0)
    leases.return_lost(Lease(shards(1)[0], {4: TIMEOUT}))
    assert leases.next(0) == Lease(shards(1)[0], {4: TIMEOUT})


@given(
    st.integers(1, 12),
    st.lists(
        st.tuples(st.sampled_from(["lease", "commit", "die", "lose"]), st.integers(0, 2)),
        max_size=60,
    ),
)
def test_every_shard_is_waiting_or_leased_once_whatever_happens(
    count: int, acts: list[tuple[str, int]]
) -> None:
    """Waiting, leased to exactly one worker, or committed: at any moment, whichever worker dies."""
    leases, done = Leases(shards(count)), set()
    hands: list[list[Lease]] = [[], [], []]
    for act, who in acts:
        hand = hands[who]
        if act == "lease" and (lease := leases.next(who, hand)):
            hand.append(lease)
        elif act == "commit" and hand:
            done.add(hand[0].shard.number)
            leases.commit(hand.pop(0).shard.number)
        elif act in ("die", "lose"):
            for lease in reversed(hand):
                leases.return_dead(lease) if act == "die" else leases.return_lost(lease)
            hand.clear()
        held = [lease.shard.number for hand in hands for lease in hand]
        waiting = [
            lease.shard.number
            for queue in (leases._isolated, *leases._queues.values())
            for lease in queue
        ]
        assert sorted([*held, *waiting, *done]) == list(range(count))
        assert leases.remaining == count - len(done)
