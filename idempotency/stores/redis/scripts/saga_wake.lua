-- Make a saga due at once that nobody owns, and forget its crashes.
-- ARGV: format, id
-- Reply: {0} where there is no saga, or it has ended; or {1}.
if not there or ended then return {0} end
if not owned or due <= now then redis.call('HSET', key, 'c', '0') end
call()
return {1}
