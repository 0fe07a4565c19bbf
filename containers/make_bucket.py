"""Make MLflow's bucket in the object store, and a user with access to this bucket only.

Runs at every start, and alone has the root keys. Repeating it is safe: it removes the users of earlier keys. The keys
come from the environment, or else from the files of make_secrets.py.
"""

import configparser
import json
import os
import sys
import time

import urllib3
from dotenv import dotenv_values
from minio import Minio, MinioAdmin
from minio.credentials import StaticProvider
from minio.error import MinioAdminException, MinioException

ENDPOINT = os.environ.get("MINIO_ENDPOINT", "minio:9000")
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
    """Return user and password from the environment, or from the store's settings file."""
    values = dotenv_values("/secrets/minio/config.env") | os.environ
    return str(values["MINIO_ROOT_USER"]), str(values["MINIO_ROOT_PASSWORD"])


def mlflow_keys() -> tuple[str, str]:
    """Return the keys of MLflow's S3 client, from the environment or its credentials file."""
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    parser = configparser.RawConfigParser()
    parser.read("/secrets/mlflow/aws")
    return parser["default"]["aws_access_key_id"], parser["default"]["aws_secret_access_key"]


def make_bucket() -> None:
    """Make bucket, policy and user. Raises MinioException or MinioAdminException."""
    root, (access_key, secret_key) = root_keys(), mlflow_keys()
    store = Minio(endpoint=ENDPOINT, access_key=root[0], secret_key=root[1], secure=False)
    if not store.bucket_exists(BUCKET):
        store.make_bucket(BUCKET)
    admin = MinioAdmin(endpoint=ENDPOINT, credentials=StaticProvider(*root), secure=False)
    admin.policy_add(POLICY, policy=ALLOWED)
    admin.user_add(access_key, secret_key)
    admin.policy_set(POLICY, user=access_key)
    for user in json.loads(admin.user_list()):
        if user != access_key:
            admin.user_remove(user)


def main() -> int:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            make_bucket()
            print(f"The bucket {BUCKET} and its user are ready.")
            return 0
        except (MinioException, MinioAdminException, urllib3.exceptions.HTTPError, OSError) as error:
            if time.monotonic() > end:
                print(f"The store at {ENDPOINT} cannot be set up: {error}", file=sys.stderr)
                return 1
            time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
