-- A client leaves: its results are dropped, its items when they are met.
-- ARGV: client
redis.call('ZREM', CLIENTS, ARGV[1])
return redis.call('DEL', RESULTS .. ARGV[1])
