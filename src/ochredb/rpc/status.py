"""A compactor's status on the wire."""

from __future__ import annotations

from ochredb.proto.v1 import compactor_pb2 as pb
from ochredb.types import CompactorStatus, JobStatus, PendingWork


def encode_status(status: CompactorStatus) -> pb.CompactorStatus:
    return pb.CompactorStatus(
        paused=status.paused,
        tails=[_encode_work(work) for work in status.tails],
        merges=[_encode_work(work) for work in status.merges],
        jobs=[
            pb.JobStatus(
                collection_id=job.collection_id,
                kind=job.kind,
                owner=job.owner,
                running=job.running,
                until_us=job.until_us,
                attempts=job.attempts,
                last_error=job.last_error,
            )
            for job in status.jobs
        ],
    )


def decode_status(message: pb.CompactorStatus) -> CompactorStatus:
    return CompactorStatus(
        paused=message.paused,
        tails=[_decode_work(work) for work in message.tails],
        merges=[_decode_work(work) for work in message.merges],
        jobs=[
            JobStatus(
                collection_id=job.collection_id,
                kind=job.kind,
                owner=job.owner,
                running=job.running,
                until_us=job.until_us,
                attempts=job.attempts,
                last_error=job.last_error if job.HasField("last_error") else None,
            )
            for job in message.jobs
        ],
    )


def _encode_work(work: PendingWork) -> pb.PendingWork:
    return pb.PendingWork(
        collection_id=work.collection,
        tail_rows=work.tail_rows,
        tail_bytes=work.tail_bytes,
        time_us=work.time_us,
        unsettled_rows=work.unsettled_rows,
    )


def _decode_work(work: pb.PendingWork) -> PendingWork:
    return PendingWork(
        work.collection_id, work.tail_rows, work.tail_bytes, work.time_us, work.unsettled_rows
    )
