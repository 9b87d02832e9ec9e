# vLLM's load test ends well even if every request has failed.
python - <<'END'
import json

found = json.load(open("measured.json"))
assert (found["completed"], found["failed"]) == (16, 0), found
assert found["total_output_tokens"] > 0, found
print(f"vllm: {found['completed']} requests, {found['total_output_tokens']} tokens")
END
