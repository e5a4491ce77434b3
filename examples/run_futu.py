from httptrading import run, Futu


# 交易通道的参数
args = {
    'host': '127.0.0.1',
    'port': 8888,
    'trade_env': 'SIMULATE',
}
futu = Futu(
    broker_args=args,
    instance_id='WyLqtMhDvAnBb6a3',
    tokens=['Vt5UCW2sLBvgPXjR', ],
)
run(
    host='0.0.0.0',
    port=8080,
    brokers=[futu, ],
)
