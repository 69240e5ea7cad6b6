"""The command line: one file per verb, loaded when it is called. Imports every room below.

In: arguments. Out: files, tables or one JSON object, and an exit code. `main` lists the verbs, `options` has
what several of them take, `session` what they do with it (its `takes` says how a verb gets its options),
`places` what they call their files, `stores` and `gathering` what they read besides image files. All of
them import rooms, whose modules are imported when they are used: `--help` must not wait for torch.
"""
