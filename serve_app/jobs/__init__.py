"""Jobs: pictures that are asked for now and fetched later, and that outlive every process of the server.

`tables` and `store` keep them, `runner` draws them through the service, `events` tells of them as they go,
`webhook` tells somebody else, `idempotency` draws one request once however often it is sent; `desk` is where
the routes come.
"""
