"""Clocks around the phases of a pass of the C++ decoder, without a clock in the product.

The kernels are compiled from a copy of their sources in which every phase of a pass is timed on the
thread that calls the pass: that thread waits at the end of a phase until all its units are done.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from ctypes import c_char_p, c_int, create_string_buffer
from pathlib import Path

from loraplex_model.ops import build

CLOCKS = r"""
#include <chrono>
#include <map>
#include <string>
#include <tuple>

namespace loraplex {

struct PhaseClock {
  using Key = std::tuple<const char*, int, const char*>;  // file, line, matrix; by address
  static thread_local inline std::map<Key, double> seconds;
  static thread_local inline const char* part = "";

  PhaseClock(const char* file, int line) : key(file, line, part), begun(now()) {}
  ~PhaseClock() { seconds[key] += now() - begun; }

  static double now() {
    auto since = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double>(since).count();
  }

  Key key;
  double begun;
};

template <class T, class Work>
void timed_run(const char* file, int line, T& team, int& phase, int units, Work work) {
  PhaseClock clock(file, line);
  team.run(phase, units, work);
}

}  // namespace loraplex
"""

READER = r"""
// Writes a line for each phase of this thread's passes, and forgets them. Returns the length.
extern "C" int loraplex_phase_times(char* out, int size) {
  std::string text;
  for (auto& [key, seconds] : loraplex::PhaseClock::seconds)
    text += std::string(std::get<0>(key)) + "\t" + std::to_string(std::get<1>(key)) + "\t" +
            std::get<2>(key) + "\t" + std::to_string(seconds * 1e3) + "\n";
  loraplex::PhaseClock::seconds.clear();
  if (int(text.size()) < size) std::copy_n(text.c_str(), text.size() + 1, out);
  return text.size();
}
"""

NAMES = {
    r"\bembed\(": "embeddings",
    r"\brotate_and_cache\(": "rotary embedding, cache",
    r"\battention\(|\battend": "attention",
    r"\bgated_unit": "product: gate_up, activation",
    r"\bgate\(|\bactivate": "activation",
    r"\bend_block\(": "norms, residuals",
    r"\blogit_rows\b": "rows of the head",
    r"\bstate_rows\b": "states",
    r"\bhead_rows\(|\bfinish_logits\(": "head",
    r"\bgain": "other sites of adapters",
}
"""What a phase outside products is called, by what its code calls."""


def instrument(folder: Path) -> None:
    """Writes the sources with clocks to `folder`, and lets this process build the kernels there."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(build.SOURCES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("decoder.h", "experts.h"):
        (folder / name).write_text(timed((folder / name).read_text(), name))
    with (folder / "team.h").open("a") as file:
        file.write(CLOCKS)
    with (folder / "library.cpp").open("a") as file:
        file.write(READER)
    build.SOURCES = folder
    build.source_digest.cache_clear()


def timed(source: str, name: str) -> str:
    """Source code with a clock for each phase, in the same lines."""
    source = re.sub(
        r"^(\s*)(project\(phase, \w+(?:\.|->)(\w+),)",
        r'\1PhaseClock::part = "\3"; \2',
        source,
        flags=re.MULTILINE,
    )
    return re.sub(r"\b(team_?)\.run\(phase,", rf'timed_run("{name}", __LINE__, \1, phase,', source)


def read(library: build.Kernels, folder: Path) -> Counter[str]:
    """Milliseconds by phase of the passes since the last call."""
    buffer = create_string_buffer(1 << 20)
    library.loraplex_phase_times.argtypes = [c_char_p, c_int]
    length = library.loraplex_phase_times(buffer, len(buffer))
    assert length < len(buffer)
    found: Counter[str] = Counter()
    sources: dict[str, str] = {}
    for line in buffer.value.decode().splitlines():
        file, number, part, milliseconds = line.split("\t")
        if file not in sources:
            sources[file] = (folder / file).read_text()
        found[label(sources[file], int(number), part)] += float(milliseconds)
    return found


def label(source: str, line: int, part: str) -> str:
    """What the phase that begins in `line` computes; `part` is the matrix multiplied last."""
    lines = source.splitlines()
    code = statement(lines, line - 1)
    if "matmul" in code:
        return f"product: {part}"
    if "expand" in code:
        return "LoRA expand"
    if "exchange" in code:
        return "inputs of products, shrink"
    if "shrink" in code:
        return "LoRA shrink"
    for pattern, name in NAMES.items():
        if re.search(pattern, code):
            return name
    return f"other: {lines[line - 1].strip()[:40]}"


def statement(lines: list[str], first: int) -> str:
    """The lines of a call, from the line where it begins to that where its brackets are closed."""
    depth, found = 0, []
    for line in lines[first:]:
        found.append(line.partition("//")[0])
        depth += found[-1].count("(") - found[-1].count(")")
        if depth <= 0:
            break
    return "\n".join(found)
