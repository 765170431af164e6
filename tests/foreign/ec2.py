"""moto as a foreign EC2 and STS for tests/moto.rs: signatures checked by botocore, permissions by moto.

Prints what it made as `name value` lines, then `ready`, and serves until its standard input ends.
"""

import io
import logging
import sys
import threading

import boto3
from botocore.config import Config
from moto import settings
from moto.core.authorization import ActionAuthenticatorMixin
from moto.core.responses import ActionResult
from moto.ec2.responses.elastic_network_interfaces import ElasticNetworkInterfaces
from moto.iam.access_control import IAMRequestBase
from moto.moto_server.werkzeug_app import DomainDispatcherApplication
from moto.server import ThreadedMotoServer
from moto.utilities.paginator import Paginator

REGION = "eu-west-1"
POLICY = '{"Version":"2012-10-17","Statement":{"Effect":"Allow","Action":"ec2:*","Resource":"*"}}'
TRUST = '{"Version":"2012-10-17","Statement":{"Effect":"Allow","Principal":"*","Action":"sts:*"}}'


REQUEST = threading.local()


def keep_body(self, environ, start_response, call=DomainDispatcherApplication.__call__):
    REQUEST.body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    environ["wsgi.input"] = io.BytesIO(REQUEST.body)
    return call(self, environ, start_response)


def check_body(self, *arguments, init=IAMRequestBase.__init__, **named):
    """moto would check the signature of a form that it has encoded anew, not of the one that came."""
    named["body"] = REQUEST.body
    init(self, *arguments, **named)


def by_pages(self):
    """DescribeNetworkInterfaces with moto's own paginator, which moto does not use here. Pages are short, as EC2's may be."""
    ids, filters = self._get_param("NetworkInterfaceIds", []), self._filters_from_querystring()
    found = self.ec2_backend.get_all_network_interfaces(ids, filters)
    asked = self._get_int_param("MaxResults")
    if asked is None:
        return ActionResult({"NetworkInterfaces": found})
    pages = Paginator(
        max_results=min(asked, 3),
        unique_attribute="id",
        starting_token=self._get_param("NextToken"),
        param_values_to_check={"filters": filters},
    )
    page, token = pages.paginate(found)
    return ActionResult({"NetworkInterfaces": page, "NextToken": token})


def unsigned_where_aws_is(self, resource="*", check=ActionAuthenticatorMixin._authenticate_and_authorize_normal_action):
    """STS takes a web identity without a signature, and moto would stumble over the missing header."""
    if self._get_action() != "AssumeRoleWithWebIdentity":
        check(self, resource)


def world(url):
    def client(service):
        keys = {"aws_access_key_id": "setup", "aws_secret_access_key": "setup"}
        direct = Config(proxies={"http": None, "https": None})
        return boto3.client(service, endpoint_url=url, region_name=REGION, config=direct, **keys)

    ec2, iam = client("ec2"), client("iam")
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    yield "vpc", vpc

    def subnet(cidr, zone):
        made = ec2.create_subnet(VpcId=vpc, CidrBlock=cidr, AvailabilityZone=REGION + zone)
        return made["Subnet"]["SubnetId"]

    home, small = subnet("10.0.0.0/17", "a"), subnet("10.0.128.0/26", "b")
    ec2.create_tags(Resources=[small], Tags=[{"Key": "kubernetes.io/role/cni", "Value": "1"}])
    yield "home", home
    yield "small", small
    yield "large", subnet("10.0.129.0/24", "b")
    for name in ("first", "second"):
        yield name, ec2.create_security_group(GroupName=name, Description=name, VpcId=vpc)["GroupId"]
    image = ec2.describe_images()["Images"][0]["ImageId"]
    started = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, SubnetId=home, InstanceType="m5.large")
    yield "instance", started["Instances"][0]["InstanceId"]

    for user in ("node", "stranger"):
        iam.create_user(UserName=user)
        key = iam.create_access_key(UserName=user)["AccessKey"]
        yield user, key["AccessKeyId"]
        yield f"{user}-secret", key["SecretAccessKey"]
    iam.put_user_policy(UserName="node", PolicyName="p", PolicyDocument=POLICY)
    role = iam.create_role(RoleName="pod", AssumeRolePolicyDocument=TRUST)["Role"]
    iam.put_role_policy(RoleName="pod", PolicyName="p", PolicyDocument=POLICY)
    yield "role", role["Arn"]


def main():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    ElasticNetworkInterfaces.describe_network_interfaces = by_pages
    ActionAuthenticatorMixin._authenticate_and_authorize_normal_action = unsigned_where_aws_is
    DomainDispatcherApplication.__call__ = keep_body
    IAMRequestBase.__init__ = check_body
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    print("url", f"http://{host}:{port}")
    for name, value in world(f"http://{host}:{port}"):
        print(name, value)
    settings.INITIAL_NO_AUTH_ACTION_COUNT = 0
    print("ready", "now", flush=True)
    sys.stdin.read()
    server.stop()


main()
