-- Extends a client's lease, sweeps, and says how the queue is.
-- ARGV: client, lease ms, 'join' the first time
-- Returns {} if the lease had ended; else {waiting queries, waiting documents, claimed items, live workers, claims in
-- work, model's fingerprint, model, counters...}: counters as pairs of name and value
local client = ARGV[1]
if ARGV[3] ~= 'join' and not client_lives(client) then
  return {}
end
redis.call('ZADD', CLIENTS, now + tonumber(ARGV[2]), client)
leases[client] = true
sweep()
local queries, documents = redis.call('ZCARD', WAITING.query), redis.call('ZCARD', WAITING.document)
local model = redis.call('HMGET', MODEL, 'fingerprint', 'info')
return {
  queries, documents, redis.call('HLEN', ITEMS) - queries - documents, live_workers(), redis.call('ZCARD', CLAIMS),
  model[1] or '', model[2] or '', unpack(redis.call('HGETALL', COUNTERS)),
}
