"""The engine: requests in, one step at a time, tokens out. It runs in a process of its own.

Owns the model and everything on the device. Exchanges `messages` with the front and nothing else.

    process/     the main loop, the socket, the front's client
      core       EngineCore.step: expire, settle, schedule, compute, commit
      reporting  the message of each step
        adapters/    which adapters are on the device
        batching/    which rows are computed
        runner/      the model
          messages

Who checks a request: the front answers the client, the engine asserts. A client's mistake is found
by `rpc` and answered with the field that is wrong; here the same condition is an assertion. The
engine refuses, with a typed failure, only for reasons that the front cannot know when it submits:
capacity, the files of an adapter, and the arithmetic itself.
"""
