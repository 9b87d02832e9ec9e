# Requests made from the OpenAPI file: no answer is a fault or has an undeclared status.
schemathesis run "$2" --url "$1" --checks not_a_server_error,status_code_conformance,content_type_conformance \
  --phases examples,coverage,fuzzing --max-examples 8 --request-timeout 60 --generation-deterministic \
  --exclude-path-regex '/v1/(files|fine_tuning|load_lora_adapter|unload_lora_adapter|adapters|aliases|engine)' --no-color
