# More pairs, many at once and several in one request; and a task whose answers are generated, several
# prompts in one request, too. The test compares all log-likelihoods in `results` with those of
# transformers and PEFT.
cat > pairs.jsonl <<'END'
{"question": "Question: What is Python?\nAnswer:", "answer": " Arr, matey! Python be a language that tells you how to make a ship sail."}
{"question": "Question: What is Python?\nAnswer:", "answer": " A large snake."}
{"question": "The sea is", "answer": " blue"}
{"question": "The sea is", "answer": " not a number, it is water; and 3 + 4 = 7."}
{"question": "Ångström, ćwiartka, 東京タワー and", "answer": " 🦜🏴‍☠️ naïve café"}
{"question": "1 2 3 4 5 6 7 8", "answer": " 9 10"}
{"question": "def f(x):\n    return", "answer": " x * 2\n\nprint(f(3))"}
{"question": "A", "answer": " B"}
{"question": "Once upon a time there was a ship. The ship had a crew of forty men, and the crew had a parrot. The parrot could speak, but it said the same thing every day. What it said was this:", "answer": " pieces of eight!"}
{"question": "ends with two spaces  ", "answer": "word"}
{"question": "no space between wor", "answer": "ds"}
{"question": "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", "answer": "Ahoy!"}
END
cat > pairs.yaml <<'END'
task: pairs
dataset_path: json
dataset_kwargs: {data_files: {test: pairs.jsonl}}
test_split: test
output_type: loglikelihood
target_delimiter: ""
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
END
cat > written.yaml <<'END'
task: written
dataset_path: json
dataset_kwargs: {data_files: {test: pairs.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\n"], max_gen_toks: 16, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]
END
ADDRESS="base_url=$1/completions,model=pirate,tokenizer_backend=remote"
lm_eval run --tasks pairs,written --include_path . --output_path results --log_samples \
  --model local-completions --model_args "$ADDRESS,num_concurrent=4" --batch_size 4
