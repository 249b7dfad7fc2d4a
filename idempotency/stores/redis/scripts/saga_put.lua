-- Write an entry from outside, unless there is one of its name.
-- ARGV: format, id, entries: one
-- Reply: {0} where there is no saga, or it has ended; or of the entry that is there now {1, now (ms), head, body}, with a
-- head of 'progress order attempt began changed'.
if not there or ended then return {0} end
if redis.call('HEXISTS', key, 'e' .. ARGV[4]) == 0 then
  record(3)
  call()
end
return {1, now, redis.call('HGET', key, 'e' .. ARGV[4]), redis.call('HGET', key, 'x' .. ARGV[4])}
