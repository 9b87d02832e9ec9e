"""One replica as a fluid: running requests share the steps, prompts take a part of each step.

Between two events the numbers of rows, adapters and waiting prompts are constant, so every running
request gets tokens at one rate. A step with prompts takes `PROMPT_STEP` times as long as one that
only decodes, as the server's setting `prompt_step_ratio` has it. Adapters are loaded one after the
other, as the server's loader does, and the least recently used ones that no request uses are
evicted.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, deque

from scale.costs import Costs
from scale.traffic import Request

PROMPT_STEP = 2.0
MAX_RUNNING = 64


class Replica:
    """A replica. Call `advance` to a time before anything else at that time."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._now = 0.0
        self._tokens = 0.0  # that a request has got which runs since the start
        self._running: list[tuple[float, int, Request]] = []
        self._prompts: deque[Request] = deque()
        self._prompt_left = 0.0  # tokens of the first prompt
        self._waiting: deque[Request] = deque()
        self._loads: deque[int] = deque()
        self._load_end = float("inf")
        self._wanted: dict[int, list[Request]] = {}
        self._device: OrderedDict[int, None] = OrderedDict()
        self._host: OrderedDict[int, None] = OrderedDict()
        self._users: Counter[int] = Counter()
        self._rows: Counter[int] = Counter()
        self._count = 0
        self.load = 0
        """Requests that run or wait."""

    @property
    def queued(self) -> int:
        """Requests that wait for a place or for their adapter."""
        return self.load - len(self._running) - len(self._prompts)

    @property
    def resident(self) -> OrderedDict[int, None]:
        """The adapters on the device."""
        return self._device

    def is_loading(self, adapter: int) -> bool:
        """Whether requests wait for an adapter."""
        return adapter in self._wanted

    def room(self) -> int:
        """Adapters that fit on the device beside those that are there or are being loaded."""
        return self._costs.on_device - len(self._device) - len(self._wanted)

    def arrive(self, request: Request) -> None:
        """Takes a request at the time of the last `advance`."""
        adapter = request.adapter
        self.load += 1
        self._users[adapter] += 1
        if adapter in self._device:
            request.tier = "device"
            self._device.move_to_end(adapter)
            self._waiting.append(request)
        else:
            request.tier = "host" if adapter in self._host else "disk"
            if adapter not in self._wanted:
                self._wanted[adapter] = []
                self._loads.append(adapter)
            self._wanted[adapter].append(request)
        self._settle()

    def next_event(self) -> float:
        """Time of the next event, if nothing arrives before."""
        found = self._load_end
        step = self._step()
        if self._prompts:
            found = min(found, self._now + self._prompt_left * self._token_time())
        if self._running:
            found = min(found, self._now + max(0.0, self._running[0][0] - self._tokens) * step)
        return found

    def advance(self, now: float) -> None:
        """Lets time pass until `now`, event by event."""
        while (event := self.next_event()) <= now:
            self._flow(event)
            self._happen()
        self._flow(now)

    def _step(self) -> float:
        """Milliseconds between two tokens of a request."""
        time = self._costs.decode(len(self._running), len(self._rows))
        return PROMPT_STEP * time if self._prompts else time

    def _token_time(self) -> float:
        """Milliseconds in which a token of a prompt is computed."""
        share = 1.0 - 1.0 / PROMPT_STEP if self._running else 1.0
        return self._costs.prompt_token / share

    def _flow(self, now: float) -> None:
        passed, self._now = now - self._now, now
        if passed <= 0:
            return
        if self._prompts:
            self._prompt_left -= passed / self._token_time()
        if self._running:
            self._tokens += passed / self._step()

    def _happen(self) -> None:
        """Ends whatever ends now."""
        tiny = 1e-6
        if self._load_end <= self._now + tiny:
            self._end_load()
        if self._prompts and self._prompt_left <= tiny:
            self._start(self._prompts.popleft())
            self._prompt_left = self._prompts[0].prompt if self._prompts else 0.0
        while self._running and self._running[0][0] <= self._tokens + tiny:
            request = heapq.heappop(self._running)[2]
            request.end = self._now
            self._leave(request)
        self._settle()

    def _start(self, request: Request) -> None:
        request.first = self._now
        self._count += 1
        heapq.heappush(self._running, (self._tokens + request.output, self._count, request))
        self._rows[request.adapter] += 1

    def _leave(self, request: Request) -> None:
        adapter = request.adapter
        for counter in (self._rows, self._users):
            counter[adapter] -= 1
            if not counter[adapter]:
                del counter[adapter]
        self.load -= 1

    def _settle(self) -> None:
        """Begins what can begin: a load, and requests for which there is a place."""
        if self._loads and self._load_end == float("inf") and self._make_room():
            adapter = self._loads[0]
            time = self._costs.from_host if adapter in self._host else self._costs.from_disk
            self._load_end = self._now + time
        while self._waiting and len(self._running) + len(self._prompts) < MAX_RUNNING:
            self._prompts.append(self._waiting.popleft())
            if len(self._prompts) == 1:
                self._prompt_left = self._prompts[0].prompt

    def _make_room(self) -> bool:
        """Evicts to host memory what no request uses. False if all is in use."""
        while len(self._device) >= self._costs.on_device:
            idle = next((each for each in self._device if each not in self._users), None)
            if idle is None:
                return False
            del self._device[idle]
            self._host[idle] = None
            if len(self._host) > self._costs.on_host:
                self._host.popitem(last=False)
        return True

    def _end_load(self) -> None:
        adapter = self._loads.popleft()
        self._load_end = float("inf")
        self._host.pop(adapter, None)
        self._device[adapter] = None
        self._waiting.extend(self._wanted.pop(adapter))
