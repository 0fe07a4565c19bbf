"""Bring the object store to what MLflow needs: a bucket, and a user who may use this bucket and nothing else.

Runs at every start with the root keys, which nobody else holds. Can be repeated; a user of earlier keys is removed.
"""

import configparser
import json
import sys
import time

import urllib3
from dotenv import dotenv_values
from minio import Minio, MinioAdmin
from minio.credentials import StaticProvider
from minio.error import MinioAdminException, MinioException

ENDPOINT = "minio:9000"
BUCKET = "mlflow"
POLICY = "mlflow"
PATIENCE = 60.0
ALLOWED = {
    "Version": "2012-10-17",
    "Statement": [
        {
            "Effect": "Allow",
            "Action": ["s3:GetBucketLocation", "s3:ListBucket", "s3:ListBucketMultipartUploads"],
            "Resource": [f"arn:aws:s3:::{BUCKET}"],
        },
        {
            "Effect": "Allow",
            "Action": [
                "s3:GetObject",
                "s3:PutObject",
                "s3:DeleteObject",
                "s3:AbortMultipartUpload",
                "s3:ListMultipartUploadParts",
            ],
            "Resource": [f"arn:aws:s3:::{BUCKET}/*"],
        },
    ],
}


def root_keys() -> tuple[str, str]:
    """User and password out of the store's own settings file."""
    values = dotenv_values("/secrets/minio/config.env")
    return str(values["MINIO_ROOT_USER"]), str(values["MINIO_ROOT_PASSWORD"])


def mlflow_keys() -> tuple[str, str]:
    """The keys that MLflow's S3 client reads."""
    parser = configparser.RawConfigParser()
    parser.read("/secrets/mlflow/aws")
    return parser["default"]["aws_access_key_id"], parser["default"]["aws_secret_access_key"]


def make_bucket() -> None:
    """Bucket, policy, user. Raises MinioException or MinioAdminException."""
    root, (access_key, secret_key) = root_keys(), mlflow_keys()
    store = Minio(endpoint=ENDPOINT, access_key=root[0], secret_key=root[1], secure=False)
    if not store.bucket_exists(BUCKET):
        store.make_bucket(BUCKET)
    admin = MinioAdmin(endpoint=ENDPOINT, credentials=StaticProvider(*root), secure=False)
    admin.policy_add(POLICY, policy=ALLOWED)
    admin.user_add(access_key, secret_key)
    admin.policy_set(POLICY, user=access_key)
    for other in json.loads(admin.user_list()):
        if other != access_key:
            admin.user_remove(other)


def main() -> int:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            make_bucket()
            print(f"The bucket {BUCKET} and its user are in place.")
            return 0
        except (MinioException, MinioAdminException, urllib3.exceptions.HTTPError, OSError) as error:
            if time.monotonic() > end:
                print(f"The store at {ENDPOINT} cannot be set up: {error}", file=sys.stderr)
                return 1
            time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
