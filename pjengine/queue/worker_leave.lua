-- ARGV: worker
return redis.call('ZREM', WORKERS, ARGV[1])
