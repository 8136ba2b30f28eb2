"""The Lua scripts against a model of the queue, on a real redis-server."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import itertools
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from pjengine.errors import EngineOverloaded, QueueUnavailable
from pjengine.queue.client_link import ClientLink, Item
from pjengine.queue.options import QueueOptions
from pjengine.queue.scripts import keys_of
from pjengine.queue.worker_link import WorkerLink
from pjengine.request import Output
from tests.queue.redis_server import RedisServer

T = TypeVar("T")

MAX_WAITING = 12
MAX_DELIVERIES = 3
TURN = 8  # claims that may pass documents over
NAMES = ("items", "payloads", "query", "document", "claims", "claim_items", "deadlines", "clients")


@dataclasses.dataclass
class ModelItem:
    id: str
    document: bool
    tokens: int
    client: ClientLink
    deliveries: int = 0
    claim: str = ""

    @property
    def last_chance(self) -> bool:
        return self.deliveries == MAX_DELIVERIES - 1


class QueueMachine(RuleBasedStateMachine):
    """Two clients, any number of claims. Time is moved by setting the times that the scripts compare with the clock."""

    server: RedisServer
    claims: Bundle[str] = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.redis = self.server.client()
        self.redis.flushall()
        self.options = QueueOptions(url=self.server.url, name="model", max_deliveries=MAX_DELIVERIES)
        self.keys = dict(zip(NAMES, keys_of("model"), strict=False))
        self.worker = WorkerLink(self.options)
        self.clients: list[ClientLink] = []
        self.gone: set[ClientLink] = set()
        self.items: dict[str, ModelItem] = {}  # neither answered nor dropped, in order of arrival
        self.expected: collections.Counter[tuple[str, str]] = collections.Counter()  # (item, finish_reason)
        self.found: collections.Counter[tuple[str, str]] = collections.Counter()
        self.numbers = itertools.count()
        self.overtaken = 0

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    @initialize()
    def join(self) -> None:
        self.clients = [ClientLink(self.options) for _ in range(2)]
        for client in self.clients:
            self.wait(client.join())

    @rule(who=st.integers(0, 1), document=st.booleans(), tokens=st.lists(st.integers(1, 20), min_size=1, max_size=5))
    def submit(self, who: int, document: bool, tokens: list[int]) -> None:
        client = self.clients[who]
        new = [ModelItem(f"item-{next(self.numbers)}", document, count, client) for count in tokens]
        items = [Item(i.id, i.document, i.tokens, i.id.encode()) for i in new]
        depth = self.redis.zcard(self.keys["query"]) + self.redis.zcard(self.keys["document"])
        if client in self.gone:
            with pytest.raises(QueueUnavailable):
                self.wait(client.submit(items, MAX_WAITING))
        elif depth + len(new) > MAX_WAITING:
            with pytest.raises(EngineOverloaded, match="max_waiting"):
                self.wait(client.submit(items, MAX_WAITING))
        else:
            self.wait(client.submit(items, MAX_WAITING))
            self.items |= {i.id: i for i in new}

    @rule(target=claims, budget=st.integers(1, 60), max_items=st.integers(1, 8), in_hand=st.integers(0, 1))
    def claim(self, budget: int, max_items: int, in_hand: int) -> Any:
        batch = self.expected_batch(budget, max_items, budget // 2, in_hand)
        documents = self.redis.zcard(self.keys["document"])
        claim = self.worker.claim(budget, max_items, budget // 2, in_hand)
        if claim is None:
            assert batch == []
            return multiple()
        assert list(claim.payloads) == [item.id for item in batch]
        assert [payload.decode() for payload in claim.payloads.values()] == list(claim.payloads)
        assert claim.alone == batch[0].last_chance
        for item in batch:
            item.claim, item.deliveries = claim.id, item.deliveries + 1
        self.overtaken = 0 if not documents or any(item.document for item in batch) else self.overtaken + 1
        return claim.id

    def expected_batch(self, budget: int, max_items: int, document_budget: int, in_hand: int) -> list[ModelItem]:
        """What a claim must take: the rules of claim.lua, written another way."""
        waiting = [i for i in self.items.values() if not i.claim and i.client not in self.gone]
        queries, documents = ([i for i in waiting if i.document == document] for document in (False, True))
        first, documents = (documents[:1], documents[1:]) if self.overtaken >= TURN else ([], documents)
        batch: list[ModelItem] = []
        for group, room in ((first, budget), (queries, budget), (documents, document_budget)):
            limit = min(budget, sum(i.tokens for i in batch) + room)
            for item in group:
                if item.last_chance and not batch:
                    return [] if in_hand else [item]
                full = len(batch) == max_items or sum(i.tokens for i in batch) + item.tokens > limit
                if batch and (full or item.last_chance):
                    break
                batch.append(item)
        return batch

    @rule(claim=claims, part=st.floats(0, 1))
    def complete(self, claim: str, part: float) -> None:
        """Of a claim in hand, or of one that ended long ago; some of the answers may be missing."""
        held = [item for item in self.items.values() if item.claim == claim]
        answered = held[: round(part * len(held))]
        strangers = [item.id for item in self.items.values() if item.claim != claim][:2]
        ids = [item.id for item in answered] + strangers
        answers = {i: msgspec.msgpack.encode(Output(request_id=i, finish_reason="stop")) for i in ids}
        published = self.worker.complete(claim, answers)
        reached = [item for item in answered if item.client not in self.gone]
        assert published == len(reached)
        self.expected.update((item.id, "stop") for item in reached)
        for item in answered:
            del self.items[item.id]
        self.ended(claim)

    @rule(claim=consumes(claims), tried=st.booleans())
    def give_back(self, claim: str, tried: bool) -> None:
        for item in self.items.values():
            if item.claim == claim and not tried:
                item.deliveries -= 1
        self.worker.give_back([claim], tried=tried)
        self.ended(claim)

    @rule(claim=claims)
    def worker_dies(self, claim: str) -> None:
        self.redis.zadd(self.keys["claims"], {claim: 1}, xx=True)
        self.sweep()
        self.ended(claim)

    def ended(self, claim: str) -> None:
        """What the claim holds waits again, or is given up."""
        for item in [item for item in self.items.values() if item.claim == claim]:
            item.claim = ""
            if item.deliveries == MAX_DELIVERIES:
                self.refused(item, "error")

    @rule(data=st.data())
    def deadline(self, data: st.DataObject) -> None:
        if self.items:
            item = self.items[data.draw(st.sampled_from(sorted(self.items)))]
            self.redis.zadd(self.keys["deadlines"], {item.id: 1}, xx=True)
            self.sweep()
            self.refused(item, "timeout")

    def refused(self, item: ModelItem, reason: str) -> None:
        del self.items[item.id]
        if item.client not in self.gone:
            self.expected[item.id, reason] += 1

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.items:
            item = self.items.pop(data.draw(st.sampled_from(sorted(self.items))))
            self.wait(item.client.cancel([item.id, "unknown"]))

    @rule(who=st.integers(0, 1), says_so=st.booleans())
    def client_goes(self, who: int, says_so: bool) -> None:
        client = self.clients[who]
        self.read_results()
        if says_so:
            self.wait(client.leave())
        else:
            self.redis.zadd(self.keys["clients"], {client.client: 1}, xx=True)
        self.gone.add(client)
        self.sweep()
        with pytest.raises(QueueUnavailable):
            self.wait(client.beat())

    def sweep(self) -> None:
        """What any live front door does every second; a third one here."""
        bystander = ClientLink(self.options)
        self.wait(bystander.join())
        self.wait(bystander.leave())
        self.wait(bystander.close())

    def read_results(self) -> None:
        for client in self.clients:
            key = keys_of("model")[-1] + client.client
            for result in self.redis.lpop(key, 1000) or []:
                output = msgspec.msgpack.decode(result, type=Output)
                self.found[output.request_id, output.finish_reason or ""] += 1

    @invariant()
    def every_answer_came_once(self) -> None:
        self.read_results()
        assert self.found == self.expected

    def teardown(self) -> None:
        """All that is left is answered, and nothing stays behind."""
        for claim in self.redis.zrange(self.keys["claims"], 0, -1):
            self.worker_dies(claim.decode())
        while (claim := self.worker.claim(1000, 1000, 1000)) is not None:
            answers = {i: msgspec.msgpack.encode(Output(request_id=i, finish_reason="stop")) for i in claim.payloads}
            self.worker.complete(claim.id, answers)
            for item in claim.payloads:
                self.expected[item, "stop"] += 1
                del self.items[item]
        self.every_answer_came_once()
        assert not [item for item in self.items.values() if item.client not in self.gone]
        assert [key for name, key in self.keys.items() if name != "clients" and self.redis.exists(key)] == []
        for client in self.clients:
            self.wait(client.close())
        self.worker.close()
        self.redis.close()
        self.runner.close()


def test_the_scripts_follow_the_model(redis_server: RedisServer) -> None:
    machine = type("Machine", (QueueMachine,), {"server": redis_server})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],  # shrinking would take minutes
        ),
    )


def test_documents_and_queries_share(options: QueueOptions) -> None:
    """Under a load of queries that fills every batch, a document gets through in each ninth; a query waits for at most
    half a batch of documents in each claim.
    """

    async def main() -> list[list[str]]:
        client, worker = ClientLink(options), WorkerLink(options)
        await client.join()
        documents = [Item(f"d{i}", True, 10, b"") for i in range(40)]
        queries = [Item(f"q{i}", False, 10, b"") for i in range(100)]
        await client.submit(documents[:20], 1000)
        batches = [list(claim.payloads) if (claim := worker.claim(40, 99, 20)) else []]
        await client.submit([*queries, *documents[20:]], 1000)
        while (claim := worker.claim(40, 99, 20)) is not None:
            batches.append(list(claim.payloads))
        await client.leave()
        await client.close()
        worker.close()
        return batches

    first, *batches = asyncio.run(main())
    assert first == ["d0", "d1"]  # half of the budget
    with_documents = [i for i, batch in enumerate(batches) if any(item[0] == "d" for item in batch)]
    assert with_documents[:3] == [8, 17, 25]
    assert batches[8] == ["d2", "q32", "q33", "q34"]
    assert [item for batch in batches for item in batch if item[0] == "q"] == [f"q{i}" for i in range(100)]
    assert [item for batch in batches for item in batch if item[0] == "d"] == [f"d{i}" for i in range(2, 40)]


def test_a_poisonous_item_takes_nothing_innocent_along(options: QueueOptions) -> None:
    """Its last delivery is alone, to a worker that has nothing else in hand."""

    async def main() -> list[Output]:
        client, worker = ClientLink(options), WorkerLink(options)
        await client.join()
        await client.submit([Item(name, False, 1, b"") for name in ("a", "poison", "b")], 10)
        for _ in range(2):  # it kills two workers
            claim = worker.claim(100, 10, 50)
            assert claim is not None
            assert list(claim.payloads) == ["a", "poison", "b"]
            worker.give_back([claim.id], tried=True)
        await client.submit([Item("new", False, 1, b"")], 10)
        answered = []
        for expected in ("a", "poison", "b", "new"):
            assert expected == "new" or worker.claim(100, 10, 50, in_hand=1) is None
            claim = worker.claim(100, 10, 50)
            assert claim is not None
            assert (list(claim.payloads), claim.alone) == ([expected], expected != "new")
            if expected == "poison":
                worker.give_back([claim.id], tried=True)
            else:
                output = Output(request_id=expected, finish_reason="stop")
                assert worker.complete(claim.id, {expected: msgspec.msgpack.encode(output)}) == 1
            answered += await client.results()
        await client.leave()
        await client.close()
        worker.close()
        return [msgspec.msgpack.decode(each, type=Output) for each in answered]

    outputs = {output.request_id: output for output in asyncio.run(main())}
    assert [name for name, output in outputs.items() if output.finish_reason == "stop"] == ["a", "b", "new"]
    assert outputs["poison"].error == "input: given up: the worker that had it died, 3 times"


def test_a_large_batch_is_claimed_in_milliseconds(options: QueueOptions) -> None:
    """More items than one call of Lua's unpack takes, and no script that holds Redis for long."""

    async def submit(client: ClientLink) -> None:
        await client.join()
        await client.submit([Item(f"i{n}", n % 4 == 0, 8, b"x" * 50) for n in range(10000)], 20000)

    client, worker = ClientLink(options), WorkerLink(options)
    with asyncio.Runner() as runner:
        runner.run(submit(client))
        start = time.process_time()
        claim = worker.claim(64000, 10000, 32000)
        assert claim is not None
        assert len(claim.payloads) == 8000
        assert worker.complete(claim.id, dict.fromkeys(claim.payloads, b"x")) == 8000
        assert time.process_time() - start < 1
        assert len(runner.run(client.results())) == 1 + 4096
        runner.run(client.leave())
        runner.run(client.close())
    worker.close()
