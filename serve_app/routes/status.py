"""What orchestrators and monitoring ask: `/healthz`, `/readyz`, `/metrics`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from serve_app.routes.answers import AnsweringRoute, service_of

router = APIRouter(tags=["status"], route_class=AnsweringRoute)

#: Reachable without a key, for whoever restarts the server and knows no secrets.
OPEN_PATHS = ("/healthz", "/readyz")


@router.get("/healthz", summary="The process is up")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", summary="A worker has its model", responses={503: {"description": "Not yet; why."}})
async def readyz(request: Request) -> JSONResponse:
    readiness = await service_of(request).readiness()
    if readiness.ready:
        return JSONResponse({"status": "ready"})
    return JSONResponse(
        {"status": "not ready", "reason": readiness.reason}, status_code=503, headers={"Retry-After": "2"}
    )


@router.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
async def metrics(request: Request) -> PlainTextResponse:
    return PlainTextResponse(await service_of(request).metrics_text(), media_type=CONTENT_TYPE_LATEST)
