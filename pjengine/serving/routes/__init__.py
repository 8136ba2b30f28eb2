"""The endpoints: one file per family, each `async def endpoint(context, body) -> Response`."""
